"""Checkpoints from which a run goes on as if it had never stopped."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class ResumableCheckpoint(ModelCheckpoint):
    """Write a checkpoint after every `every_n_train_steps` steps and at the end of each epoch.

    One that is due at the last step of an epoch is written once the epoch has ended: Lightning does not make up for the
    validation and the `on_train_epoch_end` of an epoch when it resumes from a checkpoint that was written before them.
    What Lightning cannot restore: a `ReduceLROnPlateau` misses the metric of the epoch at whose end it resumes.

    Example:
        >>> ResumableCheckpoint(dirpath="runs/one", every_n_train_steps=100, save_last=True).save_last
        True
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due, but not at the last step of an epoch."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint."""
        every_n_train_steps = self._every_n_train_steps
        self._every_n_train_steps = min(1, every_n_train_steps)
        try:
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        finally:
            self._every_n_train_steps = every_n_train_steps
        super().on_train_epoch_end(trainer, pl_module)
