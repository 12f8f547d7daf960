"""The fine-tuned language model in the format of transformers, for use elsewhere."""

import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flow_lightning.run import run_directory


class SavePretrainedCallback(Callback):
    """Write the model at the end of training with `save_pretrained`: `transformers` and `peft` load the folder.

    The folder appears whole or not at all: it is written beside its place and renamed.

    Args:
        folder: Where to write; by default `model` in the run's directory.
        merge: Whether LoRA adapters are merged into the model; by default the adapters alone are written.
    """

    def __init__(self, folder: str | Path | None = None, merge: bool = False) -> None:
        self.folder = folder
        self.merge = merge

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can be written so."""
        if not callable(getattr(pl_module, "save_pretrained", None)):
            raise TypeError(
                f"{type(pl_module).__name__} has no save_pretrained(folder). Use CausalLanguageModule, or leave out "
                "SavePretrainedCallback: Lightning's checkpoints hold the model."
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the model, on rank 0."""
        folder = Path(self.folder) if self.folder is not None else (run_directory(trainer) or Path()) / "model"
        if trainer.is_global_zero:
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            pl_module.save_pretrained(unfinished, merge=self.merge)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        trainer.strategy.barrier()
        rank_zero_info(f"The fine-tuned model is in {folder}.")
