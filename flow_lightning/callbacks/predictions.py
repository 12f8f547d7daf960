"""What a classifier predicts for each sample, as a table.

In: class probabilities from `predict_step`. Out: `predictions.csv`. Next: `cli.py`, which adds it to `predict`.
"""

import csv
import io
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flow_lightning.contract import data_contract
from flow_lightning.data.indexing import batch_index
from flow_lightning.distributed import gather, on_rank_zero
from flow_lightning.files import write_bytes
from flow_lightning.run import run_directory


class PredictionsCallback(Callback):
    """Write the most likely class of each sample, and its probability, to `predictions.csv`.

    The file is in the run's directory, or in `default_root_dir` if there is none. The module's `predict_step` must
    return class probabilities, `[B, C]`; the batches must carry `index`.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier call."""
        self.predictions: list[tuple[Tensor, ...]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note index, class and probability of each sample of a batch."""
        probabilities, classes = outputs.max(dim=1)
        self.predictions.append((batch_index(batch).cpu(), classes.cpu(), probabilities.cpu()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, by index, with the samples of all ranks."""
        rows = sorted(zip(*(values.tolist() for values in gather(trainer, self.predictions))))
        names = data_contract(trainer).class_names
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["index", "class", "name", "probability"])
        table.writerows([i, number, names[number] if names else "", f"{p:.6f}"] for i, number, p in rows)
        path = Path(run_directory(trainer) or trainer.default_root_dir) / "predictions.csv"
        on_rank_zero(trainer, lambda: write_bytes(path, text.getvalue().encode()))
        rank_zero_info(f"Predictions of {len(rows)} samples: {path.absolute()}")
