"""One denominator for the whole optimizer step: over its micro-batches and over all ranks."""

from collections.abc import Iterable

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from flow_lightning.distributed import local


class StepDenominator:
    """Make the gradient of a step `sum of all loss terms / sum of all sizes`, as one big batch would have it.

    Lightning divides by the number of micro-batches and DDP by the number of ranks, so that terms of short
    micro-batches would count more than others. Here each backward pass adds the gradient of a sum, and right before
    the optimizer step, before clipping, the gradient is divided once. Until then it is kept in a unit, a power of two
    near the size of a micro-batch, so that nothing is rounded and float16 gradients are as large as those of a mean.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget an unfinished step, and the sizes of an earlier fit."""
        self.total: Tensor | None = None
        self._unit: Tensor | None = None
        self._step = -1

    def loss(self, mean: Tensor, size: Tensor | float, trainer: Trainer) -> Tensor:
        """Return a scalar with the value of a micro-batch's `mean` and the gradient of its sum, `mean * size`.

        Args:
            mean: Mean loss of the micro-batch, scalar.
            size: Its denominator: samples, supervised tokens, or the sum of their weights.
            trainer: Runs the fit.

        Raises:
            RuntimeError: If the gradient of an earlier step was never divided.
        """
        size = torch.as_tensor(size, dtype=torch.float32, device=mean.device).detach()
        if self._unit is None:
            self._unit = _power_of_two(trainer.strategy.reduce(size.clone(), reduce_op="mean"))  # reduces in place
        if self.total is None:
            self.total, self._step = size, trainer.global_step
        elif self._step == trainer.global_step:
            self.total = self.total + size
        else:
            raise RuntimeError(
                "The gradient of the last optimizer step was not divided by its number of samples. A module with an "
                "on_before_optimizer_step of its own must call super().on_before_optimizer_step(optimizer)."
            )
        total = mean * (size / self._unit)
        return mean.detach() + (total - total.detach())

    def normalise(self, gradients: Iterable[Tensor], trainer: Trainer) -> None:
        """Divide the gradients of the step by the size of the whole step; does nothing where `loss` was not called."""
        if self.total is None or self._unit is None:
            return
        total: Tensor = trainer.strategy.reduce(self.total, reduce_op="sum")
        parts = trainer.accumulate_grad_batches * trainer.world_size
        factor = parts * self._unit / total.clamp_min(1e-30)
        for gradient in gradients:
            local(gradient).mul_(factor)
        self.total, self._unit = None, _power_of_two(total / parts)


def _power_of_two(size: Tensor) -> Tensor:
    """Return the power of two next above a size, exactly."""
    size = size.clamp_min(1e-30)
    return size / torch.frexp(size).mantissa


def spans_batches(trainer: Trainer) -> bool:
    """Tell whether an optimizer step takes more than one batch, so that one denominator must be found for all.

    DeepSpeed keeps the gradients to itself; there each micro-batch keeps its own denominator.
    """
    parts = trainer.accumulate_grad_batches * trainer.world_size
    return parts > 1 and not isinstance(trainer.strategy, DeepSpeedStrategy)
