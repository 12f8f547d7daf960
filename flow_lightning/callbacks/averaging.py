"""Training that goes back a part of the way to the pre-trained weights now and then.

In: the pre-trained parameters, the steps of a fit. Out: parameters averaged with them. Next: `stay_near.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer

from flow_lightning.callbacks.anchored import AnchoredCallback
from flow_lightning.callbacks.retention import other_callbacks
from flow_lightning.distributed import drop_gathered, local


class SequentialAveragingCallback(AnchoredCallback):
    """Average the weights with the pre-trained ones at even intervals of the fit, and at its end (SFA).

    With T the steps of the fit, `p <- (1 - weight) * p + weight * p0` after every `every * T` steps and after the last
    one; p are the trained parameters that are pre-trained, p0 their values before training. This is sequential
    fine-tuning with averaging (Kleiman et al., "Soup to go", arXiv 2501.05559), with the pre-trained model as the
    earlier checkpoint. With `every=1` it is an interpolation at the end (Wortsman et al., WiSE-FT, arXiv 2109.01903).

    Buffers, such as BatchNorm's running statistics, and the state of the optimizer stay as they are. New parts are not
    averaged; which parts are new, memory, and what a resumed fit needs, is as `AnchoredCallback` says. Weight averaging
    (EMA), validation and checkpoints see the averaged weights. A fit that is stopped early is averaged once more.

    Args:
        weight: Of the pre-trained weights, from above 0 to 1.
        every: Share of the fit's steps between two averages, from above 0 to 1.
        new_parts: Prefixes of further parameters that are not pre-trained, such as `net.head`.

    Raises:
        ValueError: If an argument is out of range. In the fit, if its number of steps is not known, or if no
            pre-trained parameter is trained. In a resumed fit, if the module was built from other weights.
        RuntimeError: If a fit resumes from a checkpoint that was written without this callback.
    """

    def __init__(self, *, weight: float = 0.25, every: float = 0.25, new_parts: Sequence[str] = ()) -> None:
        for name, value in (("weight", weight), ("every", every)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; expected a share above 0, of at most 1, such as 0.25.")
        super().__init__(new_parts)
        self.weight, self.every = weight, every
        self._total = self._interval = 0  # in steps
        self._averaged_at = 0  # the step after which the last average was taken

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, and keep the pre-trained weights."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._averaged_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Divide the fit into intervals, and be the first to act on a step that is over."""
        super().on_train_start(trainer, pl_module)
        if math.isinf(total := trainer.estimated_stepping_batches):
            raise ValueError("SequentialAveragingCallback divides the fit's steps. Set max_epochs or max_steps.")
        self._total, self._interval = int(total), max(1, round(self.every * total))
        trainer.callbacks = [self, *other_callbacks(trainer, self)]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after the last step of each interval, and of the fit."""
        due = (self._averaged_at // self._interval + 1) * self._interval
        if trainer.global_step >= min(due, self._total):
            self._average(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average at the end of a fit that was stopped early; the head is to be solved anew for this body."""
        self._average(trainer, pl_module)
        self.run.is_body_moved = True

    @torch.no_grad()
    def _average(self, trainer: Trainer, module: LightningModule) -> None:
        """Go a part of the way back, once after each step at most."""
        if trainer.global_step > self._averaged_at:
            drop_gathered(module)
            for parameter, anchor in self._anchors.items():
                local(parameter).lerp_(anchor, self.weight)
            self._averaged_at = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Return the fingerprints of the pre-trained parameters, and the step of the last average."""
        return {**super().state_dict(), "averaged_at": self._averaged_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._averaged_at = state_dict["averaged_at"]
