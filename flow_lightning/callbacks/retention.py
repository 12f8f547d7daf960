"""What a fit learned and what it kept: target task and pre-trained task, before and after training."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flow_lightning.measures.images import (
    agreement_and_kl,
    log_probabilities,
    pretrained_task_images,
    target_dataloader,
    target_outcomes,
    top1_and_top5,
)
from flow_lightning.measures.metrics import hardest
from flow_lightning.report.pictures import retention_key
from flow_lightning.report.record import is_language_model, report
from flow_lightning.run import RunCallback
from flow_lightning.scoring.score import score_dataset

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class RetentionState:
    """Everything that changes during a fit; the first four fields go into checkpoints.

    Attributes:
        before: Metrics from before training.
        hard: Positions in the test set of the samples with the highest loss before training.
        reference: Log-probabilities of the pre-trained model `[n, C]`, float32, where the images have no
            labels.
        epochs: What was measured after epochs.
        target: Loader of the test set, if there is one.
        images: Loader of the pre-trained task's images, if there are some.
        labelled: Whether these images have labels.
        resumed: Whether the fit goes on from a checkpoint.
        started: When training began, in seconds of `time.perf_counter`.
    """

    before: dict[str, float] = field(default_factory=dict)
    hard: Tensor | None = None
    reference: Tensor | None = None
    epochs: list[dict[str, float]] = field(default_factory=list)
    target: DataLoader[Any] | None = None
    images: DataLoader[Any] | None = None
    labelled: bool = True
    started: float = 0.0
    resumed: bool = False


class RetentionCallback(RunCallback):
    """Measure target task and pre-trained task before and after training, and report both.

    The pre-trained task is measured with the original head put back, with BatchNorm as trained and with the
    original BatchNorm layers. Writes `metrics.json` and `retention.png` into the run's directory and prints a
    table. The target task is measured on the test set; `flow_lightning.report.metrics.METRICS` explains every number.
    Put it after every callback that changes the model. It stands aside for a language model, which
    `LanguageRetentionCallback` measures.

    Checkpoints carry what was measured before training, so that a resumed fit need not. Without labels that
    includes 4 bytes per image and class: 200 MB for 50,000 images of 1,000 classes.

    Args:
        images: Images of the pre-trained task: a folder, a CSV file with the columns `file` and
            `class_index`, or the word `packaged` (see `retention_images`). With labels, accuracy is measured,
            otherwise agreement with the pre-trained model. None leaves this part out.
        image_size: Side of these images in pixels; by default as in the target task, or as the model expects.
        batch_size: Images per forward pass.
        num_workers: Processes that load these images.
        every_n_epochs: Measure the pre-trained task after every so many epochs, too.
        hard_fraction: The part of the test set, by loss before training, that counts as hard.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        images: str | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        every_n_epochs: int | None = None,
        hard_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(
                f"every_n_epochs is {every_n_epochs}; expected at least 1, or None to measure at the end only."
            )
        if not 0.0 < hard_fraction <= 1.0:
            raise ValueError(f"hard_fraction is {hard_fraction}; expected a number in (0, 1], such as 0.1.")
        self.images = images
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.every_n_epochs = every_n_epochs
        self.hard_fraction = hard_fraction
        self.state = RetentionState()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit and check the order of the callbacks."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.state = RetentionState()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the pre-trained model, unless the fit goes on from a checkpoint."""
        if is_language_model(pl_module):
            return
        started = time.perf_counter()
        with isolate_rng():
            self._find_data(trainer, pl_module)
        if not self.run.resumed:
            self._measure_before(trainer, pl_module)
            self.state.before["time/before_s"] = time.perf_counter() - started
        elif self.state.before:
            self._check_resumed()
        else:
            rank_zero_warn(
                f"The checkpoint {trainer.ckpt_path} was written without RetentionCallback: its model is "
                "fine-tuned already, so nothing can be measured before training, and no agreement with the "
                "pre-trained model. To have it, start the fit from the pre-trained model with "
                "RetentionCallback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.state.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the pre-trained task every `every_n_epochs` epochs."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is None or epoch % self.every_n_epochs or is_language_model(pl_module):
            return
        kept = self._kept(trainer, pl_module)
        self.state.epochs.append({"epoch": epoch, "step": trainer.global_step, **kept})
        self.run.record(trainer, {f"retention/epoch/{name}": value for name, value in kept.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the fine-tuned model and report."""
        if is_language_model(pl_module):
            return
        started = time.perf_counter()
        metrics: dict[str, Any] = {**self.state.before, "time/fit_s": started - self.state.started}
        metrics |= self._target_after(trainer, pl_module)
        metrics |= {f"retention/after/{name}": value for name, value in self._kept(trainer, pl_module).items()}
        metrics |= _averages(metrics)
        metrics["time/after_s"] = time.perf_counter() - started
        report(trainer, self.run, metrics | ({"retention/epochs": self.state.epochs} if self.state.epochs else {}))

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far: tensors and primitives only."""
        state = self.state
        return {
            "before": state.before,
            "hard": state.hard,
            "reference": state.reference,
            "epochs": state.epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier fit measured."""
        for name in ("before", "hard", "reference", "epochs"):
            setattr(self.state, name, state_dict[name])

    def _find_data(self, trainer: Trainer, module: LightningModule) -> None:
        self.state.target = target_dataloader(trainer, module, self.batch_size)
        if self.state.target is None:
            rank_zero_warn("RetentionCallback finds no test_dataloader(), so it measures no target accuracy.")
        if self.images is None:
            return
        dataset = pretrained_task_images(self.images, self.image_size, trainer, module)
        self.state.labelled = dataset.labelled
        self.state.images = DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)

    def _measure_before(self, trainer: Trainer, module: LightningModule) -> None:
        state = self.state
        state.before = dict(self._sizes())
        if state.target is not None:
            function = partial(target_outcomes, module)
            losses, correct = score_dataset(trainer, module, state.target, function, "Target before")
            state.hard = hardest(losses, self.hard_fraction)
            state.before["target/before/top1"] = _mean(correct)
        if state.images is not None and state.labelled:
            values = self._pretrained_task(trainer, module, partial(top1_and_top5, module))
            state.before |= {
                "retention/before/top1": _mean(values[0]),
                "retention/before/top5": _mean(values[1]),
            }
        elif state.images is not None:
            (state.reference,) = self._pretrained_task(trainer, module, partial(log_probabilities, module))

    def _target_after(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        if self.state.target is None:
            return {}
        function = partial(target_outcomes, module)
        _, correct = score_dataset(trainer, module, self.state.target, function, "Target after")
        measured = {"target/top1": _mean(correct)}
        if self.state.hard is not None:
            measured["target/hard_top1"] = _mean(correct[self.state.hard])
        return measured

    def _kept(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Measure the pre-trained task with BatchNorm as trained and with the original BatchNorm layers."""
        if self.state.images is None or not (self.state.labelled or self.state.reference is not None):
            return {}
        names, function = ("top1", "top5"), partial(top1_and_top5, module)
        if self.state.reference is not None:
            names, function = ("agreement", "kl"), partial(agreement_and_kl, module, self.state.reference)
        original = trained = self._pretrained_task(trainer, module, function)
        if any(isinstance(layer, _BATCH_NORMS) for layer in module.modules()):
            original = self._pretrained_task(trainer, module, function, original_batch_norm=True)
        kept = {name: _mean(value) for name, value in zip(names, trained, strict=True)}
        restored = {f"{name}_original_bn": _mean(value) for name, value in zip(names, original, strict=True)}
        return kept | restored

    def _pretrained_task(
        self,
        trainer: Trainer,
        module: Any,
        function: Callable[[Any], tuple[Tensor, ...]],
        original_batch_norm: bool = False,
    ) -> tuple[Tensor, ...]:
        assert self.state.images is not None
        description = "Pre-trained task" + (", original BatchNorm" if original_batch_norm else "")
        # The original layers come first: evaluation mode, which the sweep sets, must reach them, too.
        with module.pretrained_task(original_batch_norm=original_batch_norm):
            return score_dataset(trainer, module, self.state.images, function, description)

    def _check_resumed(self) -> None:
        """Refuse measurements from other data than those of this fit."""
        for key, size in self._sizes().items():
            if self.state.before.get(key, size) != size:
                raise ValueError(
                    f"{key} is {self.state.before[key]:.0f} in the checkpoint's measurement before training, "
                    f"but {size} now. Resume with the data of the first fit, or start anew."
                )

    def _sizes(self) -> dict[str, int]:
        found = {"target/samples": self.state.target, "retention/samples": self.state.images}
        return {key: _size(loader) for key, loader in found.items() if loader is not None}


def _size(loader: DataLoader[Any]) -> int:
    return len(loader.dataset)  # type: ignore[arg-type]


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _averages(metrics: dict[str, Any]) -> dict[str, float]:
    """Average target and pre-trained task (or agreement), for both kinds of BatchNorm."""
    kept = retention_key(metrics)
    if kept is None or "target/top1" not in metrics:
        return {}
    target = metrics["target/top1"]
    return {f"average{kind}": (target + metrics[kept + kind]) / 2 for kind in ("", "_original_bn")}
