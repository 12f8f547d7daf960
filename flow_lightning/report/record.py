"""What every measurement of a fit does with its numbers: to the loggers, into files, onto the console."""

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from rich.console import Console

from flow_lightning.report.metrics import metrics_table
from flow_lightning.report.pictures import plot_retention
from flow_lightning.run import Run


def is_language_model(module: LightningModule) -> bool:
    """Tell whether a module speaks of tokens, as `CausalLanguageModule` does, rather than of images."""
    return callable(getattr(module, "token_losses", None))


def report(trainer: Trainer, run: Run, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` and `retention.png` and print the table, on rank 0; to be called on every rank."""
    run.record(trainer, metrics)
    if trainer.is_global_zero:
        if run.directory is not None:
            plot_retention(run.metrics, run.directory / "retention.png")
        Console().print(metrics_table({"value": run.metrics}, f"What was learned and what was kept ({run.directory})"))
