"""Optimizer and learning rate schedule, the same for every module of this library."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
Schedule = Literal["cosine", "constant"]


def configure_optimizers(
    module: LightningModule,
    optimizer: OptimizerFactory,
    learning_rate: float,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
) -> OptimizerLRScheduler:
    """Build the optimizer over all trainable parameters and, step by step, the schedule over the whole run.

    Args:
        module: Whose parameters to optimise; it must be attached to a Trainer.
        optimizer: Makes the optimizer from the parameters.
        learning_rate: The peak learning rate; it replaces the optimizer's own.
        schedule: `cosine` down to 0 at the last step, or `constant`.
        warmup: Part of all steps, in `[0, 1)`, over which the rate rises linearly from 0.
    """
    built = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    for group in built.param_groups:
        group["lr"] = learning_rate
    if schedule == "constant" and warmup == 0:
        return built
    total = int(module.trainer.estimated_stepping_batches)
    # A function, not an object: LambdaLR puts objects into checkpoints, and a run that goes on for more epochs than it
    # was to have would find its old, finished schedule there.
    factor = LambdaLR(built, lambda step: _factor(schedule, round(warmup * total), total, step))
    scheduler: Any = {"scheduler": factor, "interval": "step"}
    return {"optimizer": built, "lr_scheduler": scheduler}


def _factor(schedule: Schedule, warmup_steps: int, total_steps: int, step: int) -> float:
    """Return the learning rate at a step, as a part of the peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
