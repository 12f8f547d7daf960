"""The head, fitted again on the frozen fine-tuned body after training."""

import time

from lightning import Callback, LightningModule, Trainer

from flow_lightning.callbacks.linear_probe import check_probeable, fit_head
from flow_lightning.callbacks.run_directory import run_directory
from flow_lightning.report import write_metrics


class HeadRefitCallback(Callback):
    """Fit the head again on the frozen fine-tuned body, at `on_train_end` (paper, vision protocol, step 4).

    The refitted model is written to `checkpoints/refitted.ckpt` of the run's directory: checkpoints of the training
    itself still hold the head as trained.

    Args:
        memory_budget: Features above this many GiB go to a memory-mapped temporary file.
    """

    def __init__(self, memory_budget: float = 4.0) -> None:
        self.memory_budget = memory_budget

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an unsuitable module now, not after hours of training."""
        check_probeable(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head on all training samples, unweighted."""
        started = time.perf_counter()
        probe = fit_head(trainer, pl_module, 0, self.memory_budget, "Head refit")
        directory = run_directory(trainer)
        if trainer.checkpoint_callback is not None:
            trainer.save_checkpoint(directory / "checkpoints" / "refitted.ckpt", weights_only=False)
        metrics = {"refit/strength": probe.strength, "time/refit_s": time.perf_counter() - started}
        if trainer.is_global_zero:
            write_metrics(directory / "metrics.json", metrics)
