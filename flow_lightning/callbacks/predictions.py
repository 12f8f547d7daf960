"""What a classifier says of each sample, as a table."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flow_lightning.data.indexing import batch_index
from flow_lightning.distributed import gather, on_rank_zero
from flow_lightning.files import write_bytes
from flow_lightning.run import run_directory


class PredictionsCallback(Callback):
    """Write the most likely class of each sample, and its probability, to `predictions.csv` in the run's directory.

    The module's `predict_step` must return class probabilities, `[B, C]`; the batches must carry `index`.
    """

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, ...]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier call."""
        self.found = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the most likely classes of a batch."""
        probabilities, classes = outputs.max(dim=1)
        self.found.append((batch_index(batch).cpu(), classes.cpu(), probabilities.cpu()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, sample by sample, from all ranks."""
        index, classes, probabilities = gather(trainer, self.found)
        names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        path = (run_directory(trainer) or Path()) / "predictions.csv"

        def write() -> None:
            text = io.StringIO()
            table = csv.writer(text)
            table.writerow(["index", "class", "name", "probability"])
            for i in torch.argsort(index).tolist():
                number = int(classes[i])
                name = names[number] if names is not None else ""
                table.writerow([int(index[i]), number, name, f"{float(probabilities[i]):.6f}"])
            write_bytes(path, text.getvalue().encode())

        on_rank_zero(trainer, write)
        rank_zero_info(f"Predictions of {len(index)} samples: {path.absolute()}")
