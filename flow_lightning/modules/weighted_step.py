"""The `training_step` of an unchanged module, with the losses of its samples weighted, and the proof that they are.

In: a module of any class, the weights of a batch. Out: its own step, weighted. Next: `scoring/own_step.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.tensor import DTensor

from flow_lightning.contract import module_contract
from flow_lightning.method.interception import Interception, describe
from flow_lightning.method.objective import weighted_loss
from flow_lightning.scoring.evaluation import evaluation, evaluation_stage
from flow_lightning.scoring.own_step import unnoticed
from flow_lightning.scoring.step_kinds import HOW_TO_GIVE_LOSSES

SampleLossFunction = Callable[[Any, Any], Tensor]
#: How far loss and gradient may be from those of the module itself, relatively, in 32 bits and in fewer.
_TOLERANCES = {False: (1e-5, 1e-3), True: (2e-2, 1e-1)}


class WeightedStep:
    """Stands for the `training_step` of a module from `install` to `remove`.

    Losses of `torch.nn.functional`, and `sample_losses(batch)` if the module has that method and calls it, are weighted
    where they are computed. With a function for the losses, the step is `mean(w l)` of what it returns.

    Args:
        trainer: Runs the fit.
        module: Its module.
        weights_of: Gives the weights `[B]` of a batch; None if it has no samples to weigh.
        loss: The one loss that is weighted, by name; None for all.
        function: Gives the losses `[B]` of module and batch, in place of the module's own step.
        alone: Losses that have no batch dimension, as scoring found them, see `Interception`.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights_of: Callable[[Any], Tensor | None],
        loss: str | None = None,
        function: SampleLossFunction | None = None,
        alone: set[tuple[Any, ...]] | None = None,
    ) -> None:
        self.trainer, self.module, self.weights_of = trainer, module, weights_of
        self.loss, self.function, self.alone = loss, function, set() if alone is None else alone
        self._is_proven = False
        self._is_reentrant = False  # whether checkpoints of activations allow no backward pass but `backward()`
        self._proven: set[str] = set()  # losses that were weighed in the proof
        self._own: dict[str, Any] = {}
        self._seen: Interception | None = None  # of the step that runs

    def install(self) -> None:
        """Take the place of the module's own step."""
        own = vars(self.module)
        self._own = {name: own[name] for name in ("training_step", "sample_losses") if name in own}
        step: Any = self.module.training_step

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(step, *args, **kwargs)

        if (losses := module_contract(self.module).sample_losses) is not None:
            own["sample_losses"] = lambda batch: self._weighed(losses, batch)
        own["training_step"] = training_step

    def remove(self) -> None:
        """Give the module its own step back."""
        for name in ("training_step", "sample_losses"):
            vars(self.module).pop(name, None)
        vars(self.module).update(self._own)

    def _step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        weights = self.weights_of(batch)
        if weights is None:
            return step(batch, *args, **kwargs)
        if self.function is not None:
            return weighted_loss(self.function(self.module, batch), weights)
        run = partial(self._run, partial(step, batch, *args, **kwargs))
        if not self._is_proven:
            self._is_proven = self._prove(run, torch.ones_like(weights))
        output = run(weights)
        if self._is_proven:
            self._check_batch(has_loss=output is not None)
        return output

    def _check_batch(self, has_loss: bool) -> None:
        """Refuse a batch whose losses are not weighed, though they were in the proof."""
        seen = self._seen
        assert seen is not None
        if self._proven & (set(seen.left_alone) - set(seen.rows)) or (has_loss and not seen.weighed):
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step cannot be weighted in this batch, as it was before: "
                f"{describe(seen)} {HOW_TO_GIVE_LOSSES}"
            )

    def _run(self, step: Callable[[], Any], weights: Tensor | None) -> Any:
        """Run a step with weights; with None, as the module itself does."""
        if weights is None:
            return step()
        with Interception(len(weights), weights, self.loss, alone=self.alone) as self._seen:
            try:
                return step()
            finally:
                self._seen.is_paused = True

    def _weighed(self, losses: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Compute the losses of `sample_losses`, weighted where a step asks for them."""
        if (seen := self._seen) is None or seen.is_paused:
            return losses(batch)
        with seen.paused():
            values = losses(batch)
        return seen.weigh(values)

    def _prove(self, run: Callable[[Tensor | None], Any], ones: Tensor) -> bool:
        """Compare loss and gradient of a batch with weights of 1, 1/2 and 0 with those of the module itself.

        Returns:
            Whether there was something to compare: not if the step gave no loss for this batch, or one of 0.

        Raises:
            RuntimeError: If they are not what they should be; the message says what was seen.
        """
        own = self._measure(run, None)
        if own is None or own.is_zero:
            return False
        name = f"{type(self.module).__name__}.training_step"
        one, none, half = (self._measure(run, weight * ones) for weight in (1.0, 0.0, 0.5))
        assert one is not None and none is not None and half is not None and self._seen is not None
        tolerance = _TOLERANCES[own.is_half]
        if not own.is_near(one, tolerance):
            raise RuntimeError(
                f"{name} gives {one} with weights of 1, but {own} without: its losses cannot be weighted where "
                f"they are computed (own random generators?). {HOW_TO_GIVE_LOSSES}"
            )
        if not none.middle(one).is_near(half, tolerance):
            raise RuntimeError(
                f"{name} gives {one} with weights of 1, {none} with 0 and {half} with 1/2: its loss is no weighted "
                f"mean of the samples' losses. {HOW_TO_GIVE_LOSSES}"
            )
        self._proven = set(self._seen.rows)
        self._check_rows(run, ones, self._seen.rows)
        if none.is_near(one, tolerance):
            raise RuntimeError(f"{name} cannot be weighted: {describe(self._seen)} {HOW_TO_GIVE_LOSSES}")
        if abs(none.loss) > tolerance[0] * abs(one.loss):
            rank_zero_info(
                f"FLOW: {none.loss:.3g} of the first batch's loss {one.loss:.3g} has no loss per sample (a penalty, an "
                "auxiliary loss), so it is not weighted."
            )
        return True

    def _check_rows(self, run: Callable[[Tensor | None], Any], ones: Tensor, rows: dict[str, set[int]]) -> None:
        """Refuse a step that makes more views of a sample in training than in evaluation mode, where it was scored."""
        with evaluation(self.module), evaluation_stage(self.trainer):
            self._measure(run, ones)
        assert self._seen is not None
        for loss, numbers in rows.items():
            if not numbers <= (scored := self._seen.rows.get(loss, numbers)):
                raise RuntimeError(
                    f"{type(self.module).__name__}.training_step has {loss} of {max(numbers)} rows for each sample in "
                    f"training, but of {max(scored)} in evaluation mode: whose they are is not known. "
                    f"{HOW_TO_GIVE_LOSSES}"
                )

    def _measure(self, run: Callable[[Tensor | None], Any], weights: Tensor | None) -> "_Measured | None":
        """Run a step and its backward pass without a trace; None if it gives no loss."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        with isolate_rng(), unnoticed(self.trainer, self.module) as loss_of:
            loss = loss_of(run(weights))
            if loss is None:
                return None
            try:
                gradients = self._gradients(loss, trained)
            except RuntimeError as error:
                if self._is_reentrant or "use_reentrant" not in str(error):
                    raise
                gradients = None
        if gradients is None:
            self._is_reentrant = True
            return self._measure(run, weights)
        is_half = "16" in str(self.trainer.precision) or loss.dtype.itemsize < 4
        return _Measured(float(loss.detach()), gradients, is_half)

    def _gradients(self, loss: Tensor, trained: Sequence[Tensor]) -> list[Tensor]:
        """Return a short form of the gradient of each parameter that has one."""
        # Gradients of shards are made in the backward hooks of their wrapper alone.
        if not loss.requires_grad or any(isinstance(parameter, DTensor) for parameter in trained):
            return []
        if not self._is_reentrant:
            return [_sketch(each) for each in torch.autograd.grad(loss, trained, allow_unused=True) if each is not None]
        kept = [parameter.grad for parameter in trained]
        try:
            for parameter in trained:
                parameter.grad = None
            loss.backward()
            return [_sketch(parameter.grad) for parameter in trained if parameter.grad is not None]
        finally:
            for parameter, gradient in zip(trained, kept):
                parameter.grad = gradient


def _sketch(gradient: Tensor) -> Tensor:
    """Sum elements with random signs to 1,024 numbers, whose length and distances are those of the gradient, nearly.

    So no more than one gradient is in memory. Source: Charikar, Chen and Farach-Colton, 2002 (count sketch).
    """
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    flat = (torch.view_as_real(dense) if dense.is_complex() else dense).flatten()
    generator = torch.Generator(flat.device).manual_seed(0)
    sums = torch.zeros(1024, dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
    for part in flat.split(2**18):
        signs = 2 * torch.randint(2, part.shape, generator=generator, dtype=torch.int8, device=flat.device) - 1
        sums += F.pad(part.to(sums.dtype) * signs, (0, -len(part) % 1024)).view(-1, 1024).sum(dim=0)
    return sums.cpu().double()


@dataclass
class _Measured:
    """Loss and gradient of one batch, the gradient in short form."""

    loss: float
    gradients: list[Tensor]
    is_half: bool

    @property
    def is_zero(self) -> bool:
        """Whether nothing can be seen: a hinge loss that no sample of the batch passes."""
        return self.loss == 0 and not any(gradient.any() for gradient in self.gradients)

    def is_near(self, other: "_Measured", tolerance: tuple[float, float]) -> bool:
        """Tell whether loss and gradient are the same but for rounding."""
        apart = _norm([one - two for one, two in zip(self.gradients, other.gradients)])
        is_near = abs(self.loss - other.loss) <= tolerance[0] * max(abs(self.loss), abs(other.loss), 1e-30)
        return is_near and apart <= tolerance[1] * _norm(self.gradients)

    def middle(self, other: "_Measured") -> "_Measured":
        """Return the mean of both."""
        gradients = [(one + two) / 2 for one, two in zip(self.gradients, other.gradients)]
        return _Measured((self.loss + other.loss) / 2, gradients, self.is_half)

    def __str__(self) -> str:
        return f"loss {self.loss:.6g}, gradient of norm {_norm(self.gradients):.3g}"


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
