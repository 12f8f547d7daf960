"""What every measurement of a fit does with its numbers: to the loggers, into files, onto the console."""

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from rich.console import Console

from flow_lightning.callbacks.run_directory import run_directory
from flow_lightning.report import metrics_table, plot_retention, read_metrics, write_metrics


def is_language_model(module: LightningModule) -> bool:
    """Tell whether a module speaks of tokens, as `CausalLanguageModule` does, rather than of images."""
    return callable(getattr(module, "token_losses", None))


def log_metrics(trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    """Give numbers to all loggers, at the current step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def report(trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` and `retention.png` and print the table, on rank 0; to be called on every rank."""
    folder = run_directory(trainer)  # on every rank: it broadcasts
    if trainer.is_global_zero:
        write_metrics(folder / "metrics.json", metrics)
        written = read_metrics(folder / "metrics.json")
        plot_retention(written, folder / "retention.png")
        Console().print(metrics_table({"value": written}, f"What was learned and what was kept ({folder})"))
