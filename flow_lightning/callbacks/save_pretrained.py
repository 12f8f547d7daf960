"""The fine-tuned language model in the format of transformers, for use elsewhere.

In: a module with `save_pretrained`. Out: a folder that `transformers` or `peft` loads. Next: `modules/`.
"""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flow_lightning.contract import module_contract
from flow_lightning.distributed import on_rank_zero
from flow_lightning.files import remove
from flow_lightning.run import run_directory


class SavePretrainedCallback(Callback):
    """Write the model at the end of training with `save_pretrained`.

    The folder appears whole or not at all: it is written beside its place and renamed.

    Args:
        folder: Where to write; by default `model` in the run's directory, or in `default_root_dir` if there is none.
        merge: Whether LoRA adapters are merged into the model; by default the adapters alone are written.
    """

    def __init__(self, *, folder: str | Path | None = None, merge: bool = False) -> None:
        self.folder, self.merge = folder, merge

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, with a TypeError, a module that has no `save_pretrained`."""
        if module_contract(pl_module).save_pretrained is None:
            raise TypeError(
                f"{type(pl_module).__name__} has no save_pretrained(folder). Use CausalLanguageModule, or leave out "
                "SavePretrainedCallback: Lightning's checkpoints hold the model."
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the model, on rank 0."""
        folder = Path(self.folder or Path(run_directory(trainer) or trainer.default_root_dir) / "model")

        def write() -> None:
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            remove(unfinished)
            pl_module.save_pretrained(unfinished, merge=self.merge)
            remove(folder)
            unfinished.rename(folder)

        on_rank_zero(trainer, write)
        rank_zero_info(f"The fine-tuned model is in {folder}.")
