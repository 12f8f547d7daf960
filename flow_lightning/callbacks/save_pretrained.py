"""The fine-tuned model for use elsewhere.

In: a module of any class. Out: a folder, whole or not at all. Next: `modules/saving.py`.
"""

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flow_lightning.distributed import on_rank_zero
from flow_lightning.files import remove
from flow_lightning.modules.saving import save_pretrained
from flow_lightning.run import run_directory


class SavePretrainedCallback(Callback):
    """Write the model at the end of training as the library it comes from loads it: timm, transformers or peft.

    A module with a `save_pretrained` of its own is written by that. A module with parameters outside of one model of
    these libraries is written as `model.safetensors`, its `state_dict`. The folder appears whole or not at all: it is
    written beside its place and renamed.

    Args:
        folder: Where to write; by default `model` in the run's directory, or in `default_root_dir` if there is none.
        merge: Whether LoRA adapters are merged into the model; by default the adapters alone are written.
    """

    def __init__(self, *, folder: str | Path | None = None, merge: bool = False) -> None:
        self.folder, self.merge = folder, merge

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the model, on rank 0."""
        folder = Path(self.folder or Path(run_directory(trainer) or trainer.default_root_dir) / "model")

        def write() -> None:
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            remove(unfinished)
            save_pretrained(pl_module, unfinished, self.merge)
            remove(folder)
            unfinished.rename(folder)

        on_rank_zero(trainer, write)
        rank_zero_info(f"The fine-tuned model is in {folder}.")
