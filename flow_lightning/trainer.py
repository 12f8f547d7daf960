"""The Trainer of the command line: `score` and `compare`, and checkpoints that are complete or absent.

In: a configuration, through `cli.py`. Out: a fit, a scoring or a comparison. Next: `resume.py`, `files.py`.
"""

from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from flow_lightning.callbacks.flow_weighting import FlowWeightingCallback
from flow_lightning.callbacks.linear_probe import LinearProbeCallback
from flow_lightning.distributed import on_rank_zero
from flow_lightning.files import AtomicCheckpointIO, remove, replace_folder

_METHODS = ["configs/methods/standard.yaml", "configs/methods/flow.yaml"]


class FlowTrainer(Trainer):
    """A Trainer with the two further commands of the command line.

    It writes checkpoints atomically, also those of a model in shards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    def save_checkpoint(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; a folder of shards gets its name when it is complete."""
        if not isinstance(self.strategy, FSDPStrategy | ModelParallelStrategy) or "://" in str(filepath):
            super().save_checkpoint(filepath, *args, **kwargs)
            return
        path = Path(self.strategy.broadcast(filepath))
        part = path.with_name(f".{path.name}.part")
        on_rank_zero(self, lambda: remove(part))
        super().save_checkpoint(part, *args, **kwargs)
        on_rank_zero(self, lambda: replace_folder(part, path))

    def score(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Compute the weights of the training set, report and draw them, without training."""
        wanted = (LinearProbeCallback, FlowWeightingCallback, ProgressBar)
        self.callbacks = [callback for callback in self.callbacks if isinstance(callback, wanted)]  # type: ignore[has-type]
        if not any(isinstance(callback, FlowWeightingCallback) for callback in self.callbacks):
            self.callbacks.append(FlowWeightingCallback())
        self.num_sanity_val_steps = 0
        self.fit_loop.max_epochs = 0
        self.fit(model, datamodule=datamodule)

    def compare(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        methods: list[str] = _METHODS,
        seeds: list[int] | None = None,
        output: str = "runs/compare",
    ) -> None:
        """Fit one configuration under several method files, one after the other: a table and a picture side by side.

        Args:
            model: The model.
            datamodule: The data.
            methods: Method files, each put on top of the configuration.
            seeds: Seeds, each fitted under every method; by default the configuration's own.
            output: Folder for the runs, `comparison.json` and `comparison.png`.
        """
        raise NotImplementedError(
            "compare fits several models: call it from the command line, `python main.py compare`."
        )
