"""One denominator for the whole optimizer step: over its micro-batches and over all ranks.

In: `module.batch_losses.size` of each micro-batch. Out: the gradients, divided once. Next: `flow_weighting.py`.
"""

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from flow_lightning.contract import module_contract
from flow_lightning.distributed import local


class StepDenominator(Callback):
    """Make the gradient of a step `sum of all loss terms / sum of all sizes`, as one big batch would have it.

    Lightning and DDP divide by the number of micro-batches and ranks, so that terms of short ones would count more.
    Here each backward pass adds the gradient of a sum, and it is divided once, before clipping. Until then its unit is
    a power of two near the size of a micro-batch: nothing is rounded, and float16 has gradients as large as a mean's.

    `WeightedLossModule` brings it along. Under DeepSpeed and in manual optimisation each micro-batch keeps its own
    denominator.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._unit: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an unfinished step, and the sizes of an earlier fit."""
        self._total = self._unit = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the backward pass of a micro-batch's mean give the gradient of its sum."""
        losses = module_contract(pl_module).batch_losses
        is_one_batch = trainer.accumulate_grad_batches * trainer.world_size == 1
        keeps_gradients = isinstance(trainer.strategy, DeepSpeedStrategy)
        if losses is None or not pl_module.automatic_optimization or is_one_batch or keeps_gradients:
            return
        size = torch.as_tensor(losses.size, dtype=torch.float32, device=loss.device).detach()
        if self._unit is None:
            self._unit = _power_of_two(trainer.strategy.reduce(size.clone(), reduce_op="mean"))  # reduces in place
        self._total = size if self._total is None else self._total + size
        factor = size / self._unit
        loss.register_hook(lambda gradient: gradient * factor.to(gradient.dtype))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Divide the gradients by the size of the whole step."""
        if self._total is None or self._unit is None:
            return
        total: Tensor = trainer.strategy.reduce(self._total, reduce_op="sum")
        parts = trainer.accumulate_grad_batches * trainer.world_size
        factor = parts * self._unit / total.clamp_min(1e-30)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)
        self._total, self._unit = None, _power_of_two(total / parts)


def _power_of_two(size: Tensor) -> Tensor:
    """Return the power of two next above a size, exactly."""
    size = size.clamp_min(1e-30)
    return size / torch.frexp(size).mantissa
