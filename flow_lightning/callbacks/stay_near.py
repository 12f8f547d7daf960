"""A pull of the trained parameters back to their pre-trained values, as companion or rival of the weights.

In: the pre-trained parameters, the gradients of each optimizer step. Out: gradients with the pull in them.
Next: `distillation.py`, which holds on to outputs in place of parameters.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import Optimizer

from flow_lightning.callbacks.anchored import AnchoredCallback
from flow_lightning.callbacks.retention import other_callbacks
from flow_lightning.distributed import local


class StayNearCallback(AnchoredCallback):
    """Add the penalty `strength / 2 * sum((p - p0) ** 2)`, or `strength * sum(|p - p0|)`, to the objective.

    p are the trained parameters that are pre-trained, p0 their values before training: L2-SP and L1-SP (Li et al.,
    arXiv 1802.01483). The gradient of the penalty is added to that of the loss once an optimizer step, before
    clipping. No weights apply to it. New parts are free, and so is a parameter that has no gradient in a step. Which
    parts are new, memory, and what a resumed fit needs, is as `AnchoredCallback` says.

    Args:
        strength: The factor of the penalty, in the unit of the loss per squared (`l1`: absolute) change.
        norm: `l2` or `l1`.
        new_parts: Prefixes of further parameters that are not pre-trained, such as `net.head`.

    Raises:
        ValueError: If an argument is out of range. In the fit, if no pre-trained parameter is trained. In a resumed
            fit, if the module was built from other pre-trained weights.
        RuntimeError: If a fit resumes from a checkpoint that was written without this callback.
    """

    def __init__(
        self, *, strength: float = 0.01, norm: Literal["l2", "l1"] = "l2", new_parts: Sequence[str] = ()
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; expected a number from 0, such as 0.01.")
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm is {norm!r}; expected 'l2' or 'l1'.")
        super().__init__(new_parts)
        self.strength, self.norm = strength, norm

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix what the parameters are held to, and be the last to change gradients."""
        super().on_train_start(trainer, pl_module)
        # StepDenominator divides the gradients of the losses; the penalty has no denominator.
        trainer.callbacks = [*other_callbacks(trainer, self), self]  # type: ignore[attr-defined]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty."""
        strength = self.strength * _gradient_scale(trainer, optimizer)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            anchor = self._anchors.get(parameter)
            if anchor is None or parameter.grad is None:
                continue
            change = local(parameter) - anchor
            local(parameter.grad).add_(change if self.norm == "l2" else change.sign(), alpha=strength)


def _gradient_scale(trainer: Trainer, optimizer: Any) -> float:
    """Return by what the gradients are multiplied here: fused optimizers undo the scale of 16-mixed themselves."""
    precision = trainer.precision_plugin
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch's GradScaler asks
    scaler = precision.scaler if isinstance(precision, MixedPrecision) and unscales else None
    return 1.0 if scaler is None else scaler.get_scale()
