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
from torch import Tensor
from torch.distributed.tensor import DTensor

from flow_lightning.contract import module_contract
from flow_lightning.distributed import drop_gathered
from flow_lightning.lightning_internals import isolate_rng
from flow_lightning.method.interception import Interception, describe
from flow_lightning.method.objective import weighted_loss
from flow_lightning.method.weights import TokenWeights
from flow_lightning.scoring.evaluation import evaluation, evaluation_stage
from flow_lightning.scoring.own_step import unnoticed
from flow_lightning.scoring.step_kinds import HOW_TO_GIVE_LOSSES

SampleLossFunction = Callable[[Any, Any], Tensor]
#: How far loss and gradient may be from those of the module itself, relative to their scale; in fewer than 32 bits.
_TOLERANCES, _IN_HALF = (1e-6, 1e-6), (2e-2, 1e-1)
#: How much of what the module's own gradient differs by from itself, computed with other roundings, may come on top.
_NOISE = 10.0


class WeightedStep:
    """Stands for the `training_step` of a module from `install` to `remove`.

    Losses of `torch.nn.functional`, and `sample_losses(batch)` if the module has that method and calls it, are weighted
    where they are computed. With a function for the losses, the step is `mean(w l)` of what it returns. A step that
    looks its weights up, as that of `WeightedLossModule` does, is left as it is.

    The first batch proves it: weights of 1 give the loss and the gradient of the module itself, and weights of 1/2 the
    mean of those with 1 and 0. Both hold to 1e-6 of a scale, as near a minimum the sums nearly vanish and their rounding
    does not. The loss's scale is the sum of the absolute values of its terms. The gradient's is its norm, or that with
    a random sign for each term if it is larger; to it adds ten times the module's own rounding, measured as the
    difference between its gradient and a third of that of three times its loss. In 16 bits the bounds are wider.

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
        self._weighs_itself = False  # whether the module's own step looks its weights up
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
        weights = None if self._weighs_itself else self.weights_of(batch)
        if weights is None:
            return step(batch, *args, **kwargs)
        if self.function is not None:
            return weighted_loss(self.function(self.module, batch), weights)
        run = partial(self._run, partial(step, batch, *args, **kwargs))
        if not self._is_proven:
            self._is_proven = self._prove(run, torch.ones_like(weights))
            if self._weighs_itself:
                return step(batch, *args, **kwargs)
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

    def _run(self, step: Callable[[], Any], weights: Tensor | None, **settings: bool) -> Any:
        """Run a step with weights; with None, as the module itself does. The settings are those of `Interception`."""
        if weights is None:
            self._seen = None
            return step()
        with Interception(len(weights), weights, self.loss, alone=self.alone, **settings) as self._seen:
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

    def _prove(self, run: Callable[..., Any], ones: Tensor) -> bool:
        """Compare loss and gradient of a batch with weights of 1, 1/2 and 0 with those of the module itself.

        Returns:
            Whether there was something to compare: not if the step gave no loss for this batch, or one of 0 or NaN.

        Raises:
            RuntimeError: If they are not what they should be; the message says what was seen.
        """
        own = self._measure_own(run)
        if self._weighs_itself or own is None or own.is_void:
            return False
        name = f"{type(self.module).__name__}.training_step"
        signed = self._measure(partial(run, is_signed=True), ones)
        none, half, one = (self._measure(partial(run, is_noting=weight == 1), weight * ones) for weight in (0, 0.5, 1))
        assert one is not None and none is not None and half is not None and signed is not None and self._seen
        rows, bounds = self._seen.rows, own.bounds(one, none, signed)
        if not own.is_near(one, bounds):
            raise RuntimeError(
                f"{name} gives {one} with weights of 1, but {own} without: its losses cannot be weighted where "
                f"they are computed (own random generators?). {HOW_TO_GIVE_LOSSES}"
            )
        if not none.middle(one).is_near(half, bounds):
            raise RuntimeError(
                f"{name} gives {one} with weights of 1, {none} with 0 and {half} with 1/2: its loss is no weighted "
                f"mean of the samples' losses. {HOW_TO_GIVE_LOSSES}"
            )
        self._proven = set(rows)
        if none.is_near(one, bounds):
            raise RuntimeError(f"{name} cannot be weighted: {describe(self._seen)} {HOW_TO_GIVE_LOSSES}")
        self._check_rows(run, ones, rows)
        if abs(none.loss) > max(bounds[0], 1e-5 * one.scale):
            rank_zero_info(
                f"FLOW: {none.loss:.3g} of the first batch's loss {one.loss:.3g} has no loss per sample (a penalty, an "
                "auxiliary loss), so it is not weighted."
            )
        return True

    def _measure_own(self, run: Callable[..., Any]) -> "_Measured | None":
        """Measure the module's own step, and the rounding of its gradient; notice whether it looks its weights up."""
        weights: Any = module_contract(self.module).sample_weights

        def watched(_: None) -> Any:
            before = weights.lookups
            output = run(None)
            self._weighs_itself = weights.lookups > before  # seen here, as the count is put back, too
            return output

        own = self._measure(watched, None)
        if self._weighs_itself or own is None:
            return own
        if isinstance(weights, TokenWeights):
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step does not look up the weights of its tokens. Return "
                "`self.weighted_loss(batch, self.token_losses(batch))`, or use per='sample'."
            )
        again = self._measure(run, None, factor=3.0)
        assert again is not None
        own.noise = own.distance(again)
        return own

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

    def _measure(self, run: Callable[..., Any], weights: Tensor | None, factor: float = 1.0) -> "_Measured | None":
        """Run a step and the backward pass of `factor` times its loss without a trace; None if it gives no loss."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        # Gradients of shards are made in the backward hooks of their wrapper alone.
        is_sharded = any(isinstance(parameter, DTensor) for parameter in trained)
        with isolate_rng(), unnoticed(self.trainer, self.module) as loss_of, torch.set_grad_enabled(not is_sharded):
            loss = loss_of(run(weights))
            if loss is None:
                return None
            try:
                gradients, scale = self._gradients(loss, factor, trained)
            except RuntimeError as error:
                if self._is_reentrant or "use_reentrant" not in str(error):
                    raise
                gradients = None
        if gradients is None:
            self._is_reentrant = True
            return self._measure(run, weights, factor)
        if is_sharded:
            drop_gathered(self.module)
        is_half = "16" in str(self.trainer.precision) or loss.dtype.itemsize < 4
        return _Measured(float(loss.detach()), gradients, scale, is_half)

    def _gradients(self, loss: Tensor, factor: float, trained: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Return a short form of the gradient of each parameter that has one, and the scale of the loss."""
        size = abs(float(loss.detach()))
        if not loss.requires_grad:
            return [], size
        if not self._is_reentrant:
            elements = [term.losses for term in self._seen.terms if term.losses.requires_grad] if self._seen else []
            found = torch.autograd.grad(factor * loss, [*trained, *elements], allow_unused=True)
            terms = [share * each.detach() for share, each in zip(found[len(trained) :], elements) if share is not None]
            rest = abs(float(loss.detach()) - sum(float(term.sum()) for term in terms))
            size = max(size, rest + sum(float(term.abs().sum()) for term in terms))
            return [_sketch(each, factor) for each in found[: len(trained)] if each is not None], size
        kept = [parameter.grad for parameter in trained]
        try:
            for parameter in trained:
                parameter.grad = None
            (factor * loss).backward()
            return [_sketch(parameter.grad, factor) for parameter in trained if parameter.grad is not None], size
        finally:
            for parameter, gradient in zip(trained, kept):
                parameter.grad = gradient


def _sketch(gradient: Tensor, factor: float = 1.0) -> Tensor:
    """Sum elements with random signs to 1,024 numbers, whose length and distances are those of the gradient, nearly.

    They are divided by the factor.

    So no more than one gradient is in memory. Source: Charikar, Chen and Farach-Colton, 2002 (count sketch).
    """
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    flat = (torch.view_as_real(dense) if dense.is_complex() else dense).flatten()
    generator = torch.Generator(flat.device).manual_seed(0)
    sums = torch.zeros(1024, dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
    for part in flat.split(2**18):
        signs = 2 * torch.randint(2, part.shape, generator=generator, dtype=torch.int8, device=flat.device) - 1
        sums += F.pad(part.to(sums.dtype) * signs, (0, -len(part) % 1024)).view(-1, 1024).sum(dim=0)
    return sums.cpu().double() / factor


@dataclass
class _Measured:
    """Loss and gradient of one batch, the gradient in short form.

    Attributes:
        scale: Sum of the absolute values of the terms of the loss, as far as they were seen.
        noise: Rounding of the gradient.
    """

    loss: float
    gradients: list[Tensor]
    scale: float
    is_half: bool
    noise: float = 0.0

    @property
    def is_void(self) -> bool:
        """Whether nothing can be seen: a hinge loss that no sample of the batch passes, or NaN."""
        return not math.isfinite(self.loss) or (self.loss == 0 and not any(each.any() for each in self.gradients))

    def bounds(self, one: "_Measured", none: "_Measured", signed: "_Measured") -> tuple[float, float]:
        """Return how far loss and gradient may be from those of this module itself, see `WeightedStep`."""
        loss, gradient = _IN_HALF if self.is_half else _TOLERANCES
        size = max(_norm(each.gradients) for each in (self, none, signed))
        return loss * max(self.scale, one.scale), gradient * size + _NOISE * self.noise

    def is_near(self, other: "_Measured", bounds: tuple[float, float]) -> bool:
        """Tell whether loss and gradient are the same but for rounding."""
        return abs(self.loss - other.loss) <= bounds[0] and self.distance(other) <= bounds[1]

    def distance(self, other: "_Measured") -> float:
        """Return the norm of the difference of the gradients."""
        return _norm([one - two for one, two in zip(self.gradients, other.gradients)])

    def middle(self, other: "_Measured") -> "_Measured":
        """Return the mean of both."""
        gradients = [(one + two) / 2 for one, two in zip(self.gradients, other.gradients)]
        return _Measured((self.loss + other.loss) / 2, gradients, self.scale, self.is_half)

    def __str__(self) -> str:
        return f"loss {self.loss:.6g}, gradient of norm {_norm(self.gradients):.3g}"


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
