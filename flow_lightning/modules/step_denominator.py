"""One denominator for the whole optimizer step: over its micro-batches and over all ranks."""

from collections.abc import Iterable

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from flow_lightning.modules.sharding import local

#: Gradients are summed in this unit until the step; a power of two, so that nothing is rounded.
_UNIT = 1024.0


class StepDenominator:
    """Make the gradient of a step `sum of all loss terms / sum of all sizes`, as one big batch would have it.

    Lightning divides by the number of micro-batches and DDP by the number of ranks, so that terms of short
    micro-batches would count more than others. Here each backward pass adds the gradient of a sum, and right before
    the optimizer step, before clipping, the gradient is divided once.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def loss(self, mean: Tensor, size: Tensor | float) -> Tensor:
        """Return a scalar with the value of a micro-batch's `mean` and the gradient of its sum, `mean * size`.

        Args:
            mean: Mean loss of the micro-batch, scalar.
            size: Its denominator: samples, supervised tokens, or the sum of their weights.
        """
        size = torch.as_tensor(size, dtype=torch.float32, device=mean.device).detach()
        self.total = size if self.total is None else self.total + size
        total = mean * (size / _UNIT)
        return mean.detach() + (total - total.detach())

    def normalise(self, gradients: Iterable[Tensor], trainer: Trainer) -> None:
        """Divide the gradients of the step by the size of the whole step; does nothing where `loss` was not called."""
        if self.total is None:
            return
        total: Tensor = trainer.strategy.reduce(self.total, reduce_op="sum")
        factor = trainer.accumulate_grad_batches * trainer.world_size * _UNIT / total.clamp_min(1e-30)
        for gradient in gradients:
            gradient = local(gradient)
            gradient.mul_(factor.to(gradient.dtype))
        self.total = None


def spans_batches(trainer: Trainer) -> bool:
    """Tell whether an optimizer step takes more than one batch, so that one denominator must be found for all.

    DeepSpeed keeps the gradients to itself; there each micro-batch keeps its own denominator.
    """
    parts = trainer.accumulate_grad_batches * trainer.world_size
    return parts > 1 and not isinstance(trainer.strategy, DeepSpeedStrategy)
