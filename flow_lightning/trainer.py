"""The Trainer of the command line: `score`, and checkpoints that are complete or absent.

In: a configuration, through `cli.py`. Out: a fit or a scoring. Next: `resume.py`, `files.py`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from flow_lightning.callbacks.flow_weighting import FlowWeightingCallback
from flow_lightning.callbacks.linear_probe import LinearProbeCallback
from flow_lightning.callbacks.report import ReportCallback
from flow_lightning.distributed import on_rank_zero
from flow_lightning.files import AtomicCheckpointIO, remove, replace_folder
from flow_lightning.run import files_written, run_directory


class FlowTrainer(Trainer):
    """A Trainer with the command `score`, which writes checkpoints atomically, also those of a model in shards."""

    def __init__(self, *args: Any, callbacks: list[Callback] | Callback | None = None, **kwargs: Any) -> None:
        given = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks] if callbacks else []
        probes = [callback for callback in given if isinstance(callback, LinearProbeCallback)]
        # The probe of a method takes the place of the configuration's.
        kept = [callback for callback in given if callback not in probes[:-1]]
        super().__init__(*args, callbacks=kept, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    def save_checkpoint(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; a folder of shards gets its name when it is complete."""
        if not isinstance(self.strategy, ModelParallelStrategy) or "://" in str(filepath):
            super().save_checkpoint(filepath, *args, **kwargs)
            return
        path = Path(self.strategy.broadcast(filepath))
        part = path.with_name(f".{path.name}.part")
        on_rank_zero(self, lambda: remove(part))
        super().save_checkpoint(part, *args, **kwargs)
        on_rank_zero(self, lambda: replace_folder(part, path))

    def score(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Compute the weights of the training set, report and draw them, without training."""
        wanted = (LinearProbeCallback, FlowWeightingCallback, ReportCallback, ProgressBar)
        self.callbacks = [callback for callback in self.callbacks if isinstance(callback, wanted)]  # type: ignore[has-type]
        if not any(isinstance(callback, FlowWeightingCallback) for callback in self.callbacks):
            self.callbacks.append(FlowWeightingCallback())
        self.num_sanity_val_steps = 0
        self.fit_loop.max_epochs = 0
        self.fit(model, datamodule=datamodule)
        folder = run_directory(self)
        rank_zero_info("No files are written." if folder is None else f"Files in {files_written(folder)}")
