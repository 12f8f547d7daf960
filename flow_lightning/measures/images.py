"""Measures of an image classifier: accuracy on the target task, and what is left of the pre-trained task.

In: Trainer and module. Out: accuracies, agreement, divergence. Next: `metrics.py`, `callbacks/retention.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flow_lightning.contract import data_contract, module_contract
from flow_lightning.measures.base import Measure, Metric, Panel, When
from flow_lightning.measures.metrics import hardest, kl_divergences, mean, top_k_correct
from flow_lightning.measures.target import target_dataloader
from flow_lightning.method.losses import cross_entropy
from flow_lightning.scoring.score import BatchFunction, score_dataset

if TYPE_CHECKING:
    from flow_lightning.data.retention_images import RetentionImages

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class TargetAccuracy(Measure):
    """Top-1 accuracy on the test set, and on its samples that were hardest before training.

    Batches are dicts of `image` and `target`.

    Args:
        hard_fraction: The part of the test set, by loss before training, that counts as hard.

    Raises:
        ValueError: If `hard_fraction` is outside (0, 1].
    """

    part = "target"
    metrics = (
        Metric("target/before/top1", "target accuracy before training", "fraction", "up"),
        Metric("target/top1", "target accuracy", "fraction", "up"),
        Metric("target/hard_top1", "target accuracy on the samples hardest before training", "fraction", "up"),
        Metric("target/samples", "target test samples", "samples"),
    )
    panels = (
        Panel(
            "target accuracy",
            "fraction",
            "up",
            groups={"target": "target/top1", "target,\nhardest": "target/hard_top1"},
            after={"after": "target/top1", "after,\nhardest": "target/hard_top1"},
        ),
    )

    def __init__(self, *, hard_fraction: float = 0.1) -> None:
        if not 0.0 < hard_fraction <= 1.0:
            raise ValueError(f"hard_fraction is {hard_fraction}; expected a number in (0, 1], such as 0.1.")
        self.hard_fraction = hard_fraction
        self.loader: DataLoader[Any] | None = None
        self.hard: Tensor | None = None

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Find the test set."""
        self.loader = target_dataloader(trainer)
        return {} if self.loader is None else {"target/samples": len(self.loader.dataset)}  # type: ignore[arg-type]

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Measure top-1. Note the hardest samples before training, and measure them after it."""
        if self.loader is None:
            return {}
        function = partial(target_outcomes, module)
        losses, correct = score_dataset(trainer, module, self.loader, function, f"Target {when}")
        if when == "before":
            self.hard = hardest(losses, self.hard_fraction)
            return {"top1": mean(correct)}
        return {"top1": mean(correct)} | ({} if self.hard is None else {"hard_top1": mean(correct[self.hard])})

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of the hardest samples in the test set."""
        return {"hard": self.hard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the hardest samples of an earlier fit."""
        self.hard = state.get("hard")


class PretrainedImages(Measure):
    """What is left of the pre-trained task: accuracy, or agreement with the pre-trained model if there are no labels.

    The original head is put back, with BatchNorm as trained and with the original BatchNorm layers. Without labels,
    checkpoints carry 4 bytes per image and class: 200 MB for 50,000 images of 1,000 classes.

    Args:
        images: A folder, a CSV file with the columns `file` and `class_index`, or the word `packaged` (see
            `retention_images`).
        image_size: Side of these images in pixels; by default as in the target task, or as the model expects.
        batch_size: Images per forward pass.
        num_workers: Processes that load these images.
    """

    part = "retention"
    metrics = (
        Metric("retention/before/top1", "pre-trained task before training", "fraction", "up"),
        Metric("retention/before/top5", "pre-trained task before training, top-5", "fraction", "up"),
        Metric("retention/after/top1", "pre-trained task, BatchNorm as trained", "fraction", "up"),
        Metric("retention/after/top5", "pre-trained task, BatchNorm as trained, top-5", "fraction", "up"),
        Metric("retention/after/top1_original_bn", "pre-trained task, original BatchNorm", "fraction", "up"),
        Metric("retention/after/top5_original_bn", "pre-trained task, original BatchNorm, top-5", "fraction", "up"),
        Metric("retention/before/agreement", "agreement before training, by definition", "fraction", "up"),
        Metric("retention/after/agreement", "agreement with the pre-trained model", "fraction", "up"),
        Metric("retention/after/agreement_original_bn", "agreement, original BatchNorm", "fraction", "up"),
        Metric("retention/after/kl", "KL(pre-trained || fine-tuned)", "nats", "down"),
        Metric("retention/after/kl_original_bn", "KL, original BatchNorm", "nats", "down"),
        Metric("retention/samples", "images of the pre-trained task", "samples"),
    )
    panels = tuple(
        Panel(
            title,
            "fraction",
            "up",
            groups={"pre-trained\ntask": key},
            after={"after,\nBatchNorm\nas trained": key, "after,\noriginal\nBatchNorm": f"{key}_original_bn"},
        )
        for title, key in (("pre-trained task", "retention/after/top1"), ("agreement", "retention/after/agreement"))
    )

    def __init__(
        self, images: str, *, image_size: int | None = None, batch_size: int = 128, num_workers: int = 0
    ) -> None:
        self.images, self.image_size = images, image_size
        self.batch_size, self.num_workers = batch_size, num_workers
        self.loader: DataLoader[Any] | None = None
        self.is_labelled = True
        #: Log-probabilities of the pre-trained model `[n, C]`, float32, where the images have no labels.
        self.reference: Tensor | None = None

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Open the images."""
        dataset = pretrained_task_images(self.images, self.image_size, trainer, module)
        self.is_labelled = dataset.labelled
        self.loader = DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)
        return {"retention/samples": len(dataset)}

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Measure accuracy, or agreement and divergence; after training with both kinds of BatchNorm."""
        if when == "before" and not self.is_labelled:
            (self.reference,) = self._score(trainer, module, partial(log_probabilities, module))
            return {"agreement": 1.0}
        if self.is_labelled:
            names, function = ("top1", "top5"), partial(top1_and_top5, module)
        elif self.reference is not None:
            names, function = ("agreement", "kl"), partial(agreement_and_kl, module, self.reference)
        else:  # resumed from a checkpoint without these measurements
            return {}
        original = trained = self._score(trainer, module, function)
        if when == "before":
            return _means(names, trained)
        if any(isinstance(layer, _BATCH_NORMS) for layer in module.modules()):
            original = self._score(trainer, module, function, original_batch_norm=True)
        return _means(names, trained) | _means([f"{name}_original_bn" for name in names], original)

    def state_dict(self) -> dict[str, Any]:
        """Return the log-probabilities of the pre-trained model, if the images have no labels."""
        return {"reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the pre-trained model's log-probabilities of an earlier fit."""
        self.reference = state.get("reference")

    def _score(
        self, trainer: Trainer, module: LightningModule, function: BatchFunction, original_batch_norm: bool = False
    ) -> tuple[Tensor, ...]:
        pretrained_task = module_contract(module).pretrained_task
        assert self.loader is not None and pretrained_task is not None
        description = "Pre-trained task" + (", original BatchNorm" if original_batch_norm else "")
        # The original layers come first: score_dataset must reach them when it sets evaluation mode.
        with pretrained_task(original_batch_norm=original_batch_norm):
            return score_dataset(trainer, module, self.loader, function, description)


def pretrained_task_images(
    path: str, image_size: int | None, trainer: Trainer, module: LightningModule
) -> "RetentionImages":
    """Open the images of the pre-trained task, prepared as those of the target task.

    Size, mean, standard deviation and interpolation are those that the data module sets, else what the model expects.

    Args:
        path: See `retention_images`.
        image_size: Side in pixels, if not the data module's or the model's.
        trainer: May have a data module.
        module: Has `data_config`, `pretrained_task` and `pretrained_head`.

    Raises:
        TypeError: If the module cannot put its original head back.
        ValueError: If there was no original head.
    """
    from flow_lightning.data.retention_images import retention_images  # imports timm and torchvision

    contract, data, name = module_contract(module), data_contract(trainer), type(module).__name__
    if contract.pretrained_task is None or contract.data_config is None:
        raise TypeError(
            f"{name} has no pretrained_task() or no data_config, so its original head cannot be put back. Use "
            f"ImageClassificationModule, give {name} both, or leave out PretrainedImages."
        )
    if contract.pretrained_head is None:
        raise ValueError(
            f"{name} has no pre-trained head: its checkpoint holds a body only, so there is no pre-trained task to "
            "measure. Use a checkpoint with its classifier, or leave out PretrainedImages."
        )
    config = contract.data_config
    return retention_images(
        path,
        image_size or data.image_size or config["input_size"][-1],
        mean=data.mean or config["mean"],
        std=data.std or config["std"],
        interpolation=data.interpolation or config["interpolation"],
        crop_pct=config["crop_pct"],
        num_classes=contract.pretrained_head.out_features,
    )


def target_outcomes(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Return loss in nats and top-1 (0 or 1) of each sample, both `[B]`."""
    logits = _logits(module, batch)
    return cross_entropy(logits, batch["target"]), top_k_correct(logits, batch["target"]).float()


def top1_and_top5(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Return top-1 and top-5 (0 or 1) of each sample, both `[B]`."""
    logits = _logits(module, batch)
    return top_k_correct(logits, batch["target"]).float(), top_k_correct(logits, batch["target"], k=5).float()


def log_probabilities(module: LightningModule, batch: Any) -> tuple[Tensor]:
    """Return the log-probabilities `[B, C]`, float32."""
    return (_logits(module, batch).log_softmax(dim=1),)


def agreement_and_kl(module: LightningModule, reference: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Compare with the reference's log-probabilities `[n, C]`.

    Returns:
        Whether the first choice is the same (0 or 1) and the KL divergence in nats, both `[B]`.
    """
    logits = _logits(module, batch)
    expected = reference[batch["index"].cpu()].to(logits.device)
    return top_k_correct(logits, expected.argmax(dim=1)).float(), kl_divergences(expected, logits)


def _logits(module: LightningModule, batch: Any) -> Tensor:
    if not isinstance(batch, dict) or "image" not in batch:
        got = f"a dict of {sorted(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise TypeError(
            f"TargetAccuracy got {got}; expected batches that are dicts with 'image' and 'target'. Let the data set "
            "return such dicts."
        )
    logits: Tensor = module(batch["image"])
    return logits.float()


def _means(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, float]:
    return {name: mean(value) for name, value in zip(names, values, strict=True)}
