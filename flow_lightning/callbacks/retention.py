"""What a fit learned and what it kept: measures before and after training, and after epochs if asked to.

In: measures, see `measures/base.py`. Out: numbers for `metrics.json` and loggers, a table, a picture. Next: `report/`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from flow_lightning.contract import module_contract
from flow_lightning.distributed import on_rank_zero
from flow_lightning.lightning_internals import isolate_rng
from flow_lightning.measures import Measure, PretrainedImages, TargetAccuracy, TargetLoss
from flow_lightning.measures.base import When, check_at_least
from flow_lightning.report.metrics import Declared, averages, declared_by, finite, metrics_table, print_table
from flow_lightning.run import Run, RunCallback, files_written


class RetentionCallback(RunCallback):
    """Measure what a fit learned and what it kept, before and after training, and report both.

    The numbers go into the loggers and `trainer.callback_metrics`, into `metrics.json` and `retention.png` of the run's
    directory, and into a table on the console. A checkpoint carries those from before training. The callback may stand
    anywhere in the list: it measures after every `on_fit_start`, and after every other callback's `on_train_end`.

    Args:
        measures: What to measure; by default the accuracy on the test set, of a language model the loss. See
            `flow_lightning.measures`, and `Measure` to write one of your own.
        images: Short for `PretrainedImages(images)` as a further measure.
        every_n_epochs: Also measure what was kept after every so many epochs, as `retention/epoch/...`, which
            `ModelCheckpoint` and `EarlyStopping` can monitor. In a fit with validation give them
            `save_on_train_epoch_end=True` and `check_on_train_epoch_end=True`.
        frozen_folder: For image classifiers: a folder that fits share, as those of a board do. It gets what the frozen
            pre-trained model makes of samples: features of training samples for LinearProbeCallback and of the test
            set, and answers on `images`. Labels are always those of the fit. A file is used if data and model have the
            same fingerprint, and a few samples, computed anew, give the same. Otherwise the fit says why, and makes it
            anew. Numbers are the same to the last bit. Where samples are augmented at random, nothing is shared.
    """

    def __init__(
        self,
        *,
        measures: list[Measure] | None = None,
        images: str | None = None,
        every_n_epochs: int | None = None,
        frozen_folder: str | Path | None = None,
    ) -> None:
        check_at_least(1, every_n_epochs=every_n_epochs)
        self.measures, self.images, self.every_n_epochs = measures, images, every_n_epochs
        self.frozen_folder = None if frozen_folder is None else Path(frozen_folder)
        self.before: dict[str, Any] = {}
        self.epochs: list[dict[str, float]] = []
        self._measures: dict[str, Measure] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, and choose the measures; a ValueError if two are of one class."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.before, self.epochs = {}, []
        self.run.scoring.frozen.folder = self.frozen_folder
        self._measures = self._chosen(pl_module)
        for measure in self._measures.values():
            measure.load_state_dict({})
        self.run.measures = list(self._measures.values())
        # First, so that missing data are found before hours of scoring.
        trainer.callbacks = [self, *other_callbacks(trainer, self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the data of all measures."""
        started = time.perf_counter()
        self._facts: dict[str, Any] = {}
        with isolate_rng():
            for measure in self._measures.values():
                self._facts |= measure.prepare(trainer, pl_module)
        self._preparing = time.perf_counter() - started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the pre-trained model; a resumed fit has these numbers from its checkpoint."""
        started = time.perf_counter()
        if not self.run.resumed:
            with module_contract(pl_module).frozen_reference():
                self.before = self._facts | self._measure(trainer, pl_module, "before")
            self.before["time/before_s"] = self._preparing + time.perf_counter() - started
        elif self.before:
            _check_facts(self._facts, self.before)
        else:
            rank_zero_warn(
                f"The checkpoint {trainer.ckpt_path} was written without RetentionCallback, so there are no numbers "
                "from before training. For them, start the fit from the pre-trained model with RetentionCallback."
            )
        course = {"retention/epochs": self.epochs} if self.epochs else {}
        self.run.record(trainer, self._facts | self.before | course)
        # Last but for checkpoints, as in Lightning: the end is measured when every callback has changed the model.
        callbacks = [*other_callbacks(trainer, self), self]
        trainer.callbacks = sorted(callbacks, key=lambda other: isinstance(other, Checkpoint))  # type: ignore[attr-defined]
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what was kept, every `every_n_epochs` epochs."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is None or epoch % self.every_n_epochs:
            return
        values = self._measure(trainer, pl_module, "epoch")
        by_name = {key.removeprefix("retention/epoch/"): value for key, value in values.items()}
        self.epochs.append({"epoch": epoch, "step": trainer.global_step, **by_name})
        pl_module.log_dict(values, batch_size=1, sync_dist=True)
        self.run.record(trainer, {"retention/epochs": self.epochs})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the fine-tuned model and report."""
        started = time.perf_counter()
        metrics = {"time/fit_s": started - self._started} | self._measure(trainer, pl_module, "after")
        declared = declared_by(self._measures.values())
        metrics |= averages(metrics, declared)
        metrics["time/after_s"] = time.perf_counter() - started
        self.run.record(trainer, metrics)
        on_rank_zero(trainer, lambda: _report(self.run, declared, trainer.loggers))

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far: tensors and primitives only."""
        states = {name: measure.state_dict() for name, measure in self._measures.items()}
        return {"before": self.before, "epochs": self.epochs, "measures": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier fit measured."""
        self.before, self.epochs = state_dict["before"], state_dict["epochs"]
        for name, measure in self._measures.items():
            measure.load_state_dict(state_dict["measures"].get(name, {}))

    def _chosen(self, module: LightningModule) -> dict[str, Measure]:
        """Return the measures of this fit by the name of their class."""
        default = TargetAccuracy if module_contract(module).token_losses is None else TargetLoss
        measures: list[Measure] = [default()] if self.measures is None else list(self.measures)
        if self.images is not None:
            measures.append(PretrainedImages(self.images))
        names = [type(measure).__name__ for measure in measures]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"measures has {twice} more than once, with the same keys. Keep one of each.")
        return dict(zip(names, measures))

    def _measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, Any]:
        """Return the numbers of all measures, by key; after an epoch those of what was kept."""
        return {
            measure.key(when, name): value
            for measure in self._measures.values()
            if when != "epoch" or measure.part == "retention"
            for name, value in measure.measure(trainer, module, when).items()
        }


def other_callbacks(trainer: Trainer, callback: Callback) -> list[Callback]:
    """Return the other callbacks as a new list: Lightning goes through the present one."""
    return [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]


def _check_facts(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse numbers of other data or measures than those of this fit."""
    for key, fact in now.items():
        if before.get(key) != fact:
            raise ValueError(
                f"{key} was {before.get(key, 'not measured')} before training, but is {fact} now. Resume with the data "
                "and the measures of the first fit, or start a new one."
            )


def _report(run: Run, declared: Declared, loggers: Sequence[Any]) -> None:
    """Draw the picture and print the table."""
    metrics = finite(run.metrics)
    files = "trainer.callback_metrics has these numbers; no files are written."
    if run.directory is not None:
        from flow_lightning.report.loggers import log_picture  # matplotlib is slow to import
        from flow_lightning.report.pictures import plot_retention

        plot_retention(metrics, run.directory / "retention.png", declared)
        log_picture(loggers, "retention", run.directory / "retention.png")
        files = f"Files in {files_written(run.directory)}"
    print_table(metrics_table({"value": metrics}, "What was learned and what was kept", declared), files)
