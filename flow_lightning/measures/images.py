"""Measures of an image classifier: accuracy on the target task, and what is left of the pre-trained task.

In: Trainer and module. Out: accuracies, agreement, divergence. Next: `callbacks/retention.py`.
"""

import math
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.contract import data_contract, image_settings, module_contract
from flow_lightning.measures.base import Measure, Metric, Panel, When
from flow_lightning.measures.target import TargetMeasure
from flow_lightning.method.losses import answer_change, cross_entropy
from flow_lightning.scoring.evaluation import batch_norms, evaluation
from flow_lightning.scoring.samples import cut_batches
from flow_lightning.scoring.score import BatchFunction, score_dataset

#: Labels of bars in the picture of a run, with the keys of those of the target.
_TARGET_BARS = {"after": "target/top1", "after,\nhardest": "target/hard_top1"}
_KINDS_OF_BATCH_NORM = ("after,\nBatchNorm\nas trained", "after,\noriginal\nBatchNorm")


class TargetAccuracy(TargetMeasure):
    """Top-1 accuracy on the test set, and on its samples that were hardest before training.

    Batches are dicts of `image` and `target`. Of the test set, `hard_fraction` in (0, 1] counts as hard.
    """

    metrics = (
        Metric("target/before/top1", "target accuracy before training", "fraction", "up"),
        Metric("target/top1", "target accuracy", "fraction", "up"),
        Metric("target/hard_top1", "target accuracy on the samples hardest before training", "fraction", "up"),
        TargetMeasure.samples,
    )
    panels = (Panel("target accuracy", "fraction", "up", "target/top1", _TARGET_BARS),)
    carried = ("hard", "answers")

    def __init__(self, *, hard_fraction: float = 0.1) -> None:
        if not 0.0 < hard_fraction <= 1.0:
            raise ValueError(f"hard_fraction is {hard_fraction}; expected a number in (0, 1], such as 0.1.")
        self.hard_fraction = hard_fraction
        self.hard: Tensor | None = None

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Measure top-1. Note the hardest samples before training, and measure them after it."""
        if self.loader is None:
            return {}
        losses, correct, chosen, given = self.outcomes(trainer, module, when)
        self.note(when, chosen, given)
        if when == "before":
            self.hard = hardest(losses, self.hard_fraction)
            return {"top1": mean(correct)}
        return {"top1": mean(correct)} | ({} if self.hard is None else {"hard_top1": mean(correct[self.hard])})

    def outcomes(self, trainer: Trainer, module: LightningModule, when: When) -> tuple[Tensor, ...]:
        """Return what `target_outcomes` does of the test set; "before" the body must be the pre-trained one."""
        loader, says = cast(DataLoader[Any], self.loader), f"Target {when}"
        found = self._of_frozen(trainer, module, loader, says) if when == "before" else None
        return found or score_dataset(trainer, module, loader, partial(target_outcomes, module), says)

    def _of_frozen(
        self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any], says: str
    ) -> tuple[Tensor, ...] | None:
        """Return the outcomes of the head as it is now on features of the frozen body, if these are known apart."""
        contract = module_contract(module)
        if contract.flow_run is None or contract.pretrained_task is None:
            return None
        if (found := contract.flow_run.scoring.frozen.features("target", loader, says)) is None:
            return None
        head: Any = contract.head
        parts = []
        with evaluation(module), trainer.precision_plugin.forward_context():
            for batch in map(torch.as_tensor, cut_batches(loader)):  # of the same size: every bit is the same
                features, targets = (each[batch].to(head.weight.device) for each in found)
                parts.append(outcomes_of(head(features.to(head.weight.dtype)).float(), targets))
        return tuple(torch.cat(values).cpu() for values in zip(*parts))


class PretrainedImages(Measure):
    """What is left of the pre-trained task: accuracy, or agreement with the pre-trained model if there are no labels.

    The original head is put back, with BatchNorm as trained and with the original BatchNorm layers. Without labels,
    checkpoints carry 4 bytes per image and class. Images are prepared as the data module says, else as the model
    expects.

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
        Panel(title, "fraction", "up", key, dict(zip(_KINDS_OF_BATCH_NORM, (key, f"{key}_original_bn"))))
        for title, key in (("pre-trained task", "retention/after/top1"), ("agreement", "retention/after/agreement"))
    )
    carried = ("reference", "answers")
    loader: DataLoader[Any]
    labelled: bool

    def __init__(
        self, images: str, *, image_size: int | None = None, batch_size: int = 128, num_workers: int = 0
    ) -> None:
        self.images, self.image_size = images, image_size
        self.batch_size, self.num_workers = batch_size, num_workers
        #: Log-probabilities of the pre-trained model `[n, C]`, float32, where the images have no labels.
        self.reference: Tensor | None = None

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Open the images; refuse a module that cannot put its original head back."""
        from flow_lightning.data.retention_images import retention_images  # imports timm and torchvision

        contract, name = module_contract(module), type(module).__name__
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
        config = image_settings(trainer, module)
        dataset = retention_images(
            self.images,
            self.image_size or data_contract(trainer).image_size or config["input_size"][-1],
            num_classes=contract.pretrained_head.out_features,
            **{name: config[name] for name in ("mean", "std", "interpolation", "crop_pct")},
        )
        self.labelled = dataset.labelled
        self.loader = DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)
        return {"retention/samples": len(dataset)}

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Measure accuracy, or agreement and divergence; after training with both kinds of BatchNorm."""
        if when == "before" and not self.labelled:
            (self.reference,) = self.before(trainer, module, "retention", self.loader)
            self.note(when, self.reference.argmax(dim=1))
            return {"agreement": 1.0}
        if self.labelled:
            names, function = ("top1", "top5"), partial(top1_and_top5, module)
        elif self.reference is not None:
            names, function = ("agreement", "kl"), partial(agreement_and_kl, module, self.reference)
        else:  # resumed from a checkpoint without these measurements
            return {}
        before = self.before(trainer, module, "retention", self.loader) if when == "before" else None
        outcomes = {"": before or self._score(trainer, module, function)}
        self.note(when, *outcomes[""][2:])
        if when != "before":
            has_layers = len(batch_norms(module)) > 0
            outcomes["_original_bn"] = self._score(trainer, module, function, True) if has_layers else outcomes[""]
        return {name + kind: mean(value) for kind in outcomes for name, value in zip(names, outcomes[kind])}

    def before(self, trainer: Trainer, module: Any, name: str, loader: DataLoader[Any]) -> tuple[Tensor, ...]:
        """Return what the pre-trained model does, as `top1_and_top5` or `log_probabilities` do: found once in a fit.

        `name` is that of its file, see `Frozen.values`; the loader reads the images.
        """
        function = partial(top1_and_top5 if self.labelled else log_probabilities, module)
        if (run := module_contract(module).flow_run) is None:
            return self._score(trainer, module, function)
        with module.pretrained_task():
            return run.scoring.frozen.values(name, loader, function, "Pre-trained task")  # type: ignore[no-any-return]

    def _score(
        self, trainer: Trainer, module: Any, function: BatchFunction, original_batch_norm: bool = False
    ) -> tuple[Tensor, ...]:
        description = "Pre-trained task" + (", original BatchNorm" if original_batch_norm else "")
        # The original layers come first: score_dataset must reach them when it sets evaluation mode.
        with module.pretrained_task(original_batch_norm=original_batch_norm):
            return score_dataset(trainer, module, self.loader, function, description)


def target_outcomes(module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
    """Return loss in nats, top-1 (0 or 1), the chosen class and the given one of each sample, `[B]` each."""
    if not isinstance(batch, dict) or "image" not in batch:
        got = f"a dict of {sorted(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise TypeError(f"TargetAccuracy got {got}; expected batches that are dicts with 'image' and 'target'.")
    return outcomes_of(_logits(module, batch), batch["target"])


def outcomes_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return what `target_outcomes` does, of logits `[B, C]` and targets `[B]`."""
    return cross_entropy(logits, targets), top_k_correct(logits, targets).float(), logits.argmax(dim=1), targets


def top1_and_top5(module: LightningModule, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return top-1 and top-5 (0 or 1), the chosen class and the given one of each sample, `[B]` each."""
    logits, targets = _logits(module, batch), batch["target"]
    correct = (top_k_correct(logits, targets, k=k).float() for k in (1, 5))
    return *correct, logits.argmax(dim=1), targets


def log_probabilities(module: LightningModule, batch: dict[str, Tensor]) -> tuple[Tensor]:
    """Return the log-probabilities `[B, C]`, float32."""
    return (_logits(module, batch).log_softmax(dim=1),)


def agreement_and_kl(module: LightningModule, reference: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Compare with log-probabilities `[n, C]`: same first choice (0 or 1), KL in nats, and the choice, `[B]` each."""
    logits = _logits(module, batch)
    expected = reference[batch["index"].cpu()].to(logits.device)
    chosen = logits.argmax(dim=1)
    return top_k_correct(logits, expected.argmax(dim=1)).float(), answer_change(expected, logits).clamp_min(0.0), chosen


def _logits(module: LightningModule, batch: dict[str, Tensor]) -> Tensor:
    return module(batch["image"]).float()  # type: ignore[no-any-return]


def top_k_correct(logits: Tensor, targets: Tensor, k: int = 1) -> Tensor:
    """Tell for logits `[B, C]` whether the target `[B]` is among the `k` largest: booleans `[B]`.

    A row with a NaN is wrong: the network has diverged. With fewer than `k` classes every other row is right.
    """
    guesses = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (guesses == targets[:, None]).any(dim=1) & ~logits.isnan().any(dim=1)


def hardest(losses: Tensor, fraction: float = 0.1) -> Tensor:
    """Return the indices of the `ceil(fraction * n)` samples with the highest losses `[n]`, in ascending order.

    NaN counts as the highest. The paper's Table 5 takes a tenth.
    """
    # Rounded first: 0.1 * 30 is 3.0000000000000004, and 4 of 30 is not a tenth.
    count = math.ceil(round(fraction * losses.numel(), 9))
    return losses.topk(count).indices.sort().values


def mean(values: Tensor) -> float:
    """Return the mean, summed in float64."""
    return values.double().mean().item()
