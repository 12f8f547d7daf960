"""Stop at the first loss that is NaN or infinite, before it reaches a checkpoint, and name its samples.

In: `module.batch_losses` of each batch. Out: FloatingPointError. Next: `step_denominator.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from flow_lightning.contract import BatchLosses, module_contract
from flow_lightning.distributed import local

_FIX = "Lower the learning rate, clip gradients (--trainer.gradient_clip_val 1.0), or train in 32-true or bf16-mixed."
#: Batches between two checks where the Trainer logs nothing.
_INTERVAL = 50


class StopOnNaN(Callback):
    """Check the losses every `log_every_n_steps` batches, when Lightning waits for the device anyway.

    It also checks losses and parameters before each checkpoint is written, and at the end of a validation and an epoch.
    A FloatingPointError on every rank names the first such batch and its samples. `WeightedLossModule` brings it along.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, BatchLosses]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._unchecked = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the losses, and check those kept if it is time."""
        number, losses = trainer.fit_loop.total_batch_idx, module_contract(pl_module).batch_losses
        if losses is not None:
            self._unchecked.append((number, losses))
            pl_module.batch_losses = None  # type: ignore[assignment]
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if any(checkpoint.save_weights_only and not checkpoint.every_n_epochs for checkpoint in checkpoints):
            self._check(trainer, pl_module.parameters())  # Lightning calls no hook of ours before it writes them
        elif (number + 1) % (trainer.log_every_n_steps or _INTERVAL) == 0:  # type: ignore[attr-defined]
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything."""
        self._check(trainer, pl_module.parameters())

    on_train_epoch_end = on_validation_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check everything: a model that has diverged must not take the place of a sound one."""
        self._check(trainer, pl_module.parameters())

    def _check(self, trainer: Trainer, parameters: Iterable[Tensor] = ()) -> None:
        problem = self._broken_losses()
        if problem is None and not all(bool(torch.isfinite(local(value)).all()) for value in parameters):
            problem = (
                f"Parameters of the model are NaN or infinite after batch {trainer.fit_loop.total_batch_idx}: it has "
                f"diverged. {_FIX}"
            )
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            raise FloatingPointError(problem or "Training has diverged in another process; see its message.")

    def _broken_losses(self) -> str | None:
        unchecked, self._unchecked = self._unchecked, []
        finite = torch.stack([kept.losses.isfinite().all() for _, kept in unchecked]).tolist() if unchecked else []
        return None if all(finite) else _message(*unchecked[finite.index(False)])


def _message(batch: int, kept: BatchLosses) -> str:
    start = f"The training loss is NaN or infinite at batch {batch}"
    if kept.samples is None:
        return f"{start}. If its samples are sound, the model has diverged. {_FIX}"
    broken = ~torch.isfinite(kept.losses).to(kept.samples.device)
    own = broken.shape == kept.samples.shape
    samples = (kept.samples[broken] if own else kept.samples).tolist()
    shown = ", ".join(map(str, samples[:20])) + (", ..." if len(samples) > 20 else "")
    return (
        f"{start}, {'for' if own else 'in a batch of'} the samples {shown} of the training set. If these samples are "
        f"sound, the model has diverged. {_FIX}"
    )
