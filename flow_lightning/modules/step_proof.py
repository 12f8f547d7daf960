"""The proof that the losses of a module's own `training_step` are weighted right, by its first batch.

In: a step that can be run with weights. Out: an error that says what was seen, or nothing. Next: `weighted_step.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from flow_lightning.method.weights import TokenWeights
from flow_lightning.scoring.evaluation import evaluation, evaluation_stage
from flow_lightning.scoring.own_step import HOW_TO_GIVE_LOSSES, unnoticed

#: How far loss and gradient may be from those of the module itself, relative to their scale; in fewer than 32 bits.
_TOLERANCES, _IN_HALF = (1e-6, 1e-6), (2e-2, 1e-1)
#: How much of what the module's own gradient differs by from itself, computed with other roundings, may come on top.
_NOISE = 3.0

#: Runs the step with weights `[B]`, or as it is with None, and gives its output; takes settings of `Interception`, too.
Run = Callable[..., tuple[Any, Interception | None]]


class StepProof:
    """Compares loss and gradient of a batch with weights of 1, 1/2 and 0 with those of the module itself.

    Weights of 1 must give the loss and the gradient of the module itself, and weights of 1/2 the mean of those with 1
    and 0. Both hold to 1e-6 of a scale, as near a minimum sums nearly vanish and their rounding does not. The loss's
    scale is the sum of the absolute values of its terms. The gradient's is its norm, or that with a random sign for
    each term if it is larger. To it adds three times the module's own rounding: the difference between its gradient and
    a third of that of three times its loss. In 16 bits the bounds are wider.

    Attributes:
        weighs_itself: Whether the step looks its weights up, so that there is nothing to prove.
        losses: The losses that were weighed, once it is proven.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.weighs_itself = False
        self.losses: set[str] = set()
        self._is_reentrant = False  # whether checkpoints of activations allow no backward pass but `backward()`
        self._seen: Interception | None = None  # of the last run

    def give(self, run: Run, ones: Tensor) -> None:
        """Prove a step, unless it gave no loss for this batch, or one of 0 or NaN.

        Raises:
            RuntimeError: If they are not what they should be; the message says what was seen.
        """
        own = self._measure_own(run)
        if self.weighs_itself or own is None or own.is_void:
            return
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
        if none.is_near(one, bounds):
            raise RuntimeError(f"{name} cannot be weighted: {describe(self._seen)} {HOW_TO_GIVE_LOSSES}")
        self._check_rows(run, ones, rows)
        self.losses = set(rows)
        if abs(none.loss) > bounds[0]:
            rank_zero_info(
                f"FLOW: {none.loss:.3g} of the first batch's loss {one.loss:.3g} has no loss per sample (a penalty, an "
                "auxiliary loss), so it is not weighted."
            )

    def _measure_own(self, run: Run) -> "_Measured | None":
        """Measure the module's own step, and the rounding of its gradient; notice whether it looks its weights up."""
        weights: Any = module_contract(self.module).sample_weights

        def watched(_: None) -> tuple[Any, None]:
            before = weights.lookups
            output = run(None)[0]
            self.weighs_itself = weights.lookups > before  # seen here, as the count is put back, too
            return output, None

        own = self._measure(watched, None)
        if self.weighs_itself or own is None:
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

    def _check_rows(self, run: Run, ones: Tensor, rows: dict[str, set[int]]) -> None:
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

    def _measure(self, run: Run, weights: Tensor | None, factor: float = 1.0) -> "_Measured | None":
        """Run a step and the backward pass of `factor` times its loss without a trace; None if it gives no loss."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        # Gradients of shards are made in the backward hooks of their wrapper alone.
        is_sharded = any(isinstance(parameter, DTensor) for parameter in trained)
        with isolate_rng(), unnoticed(self.trainer, self.module) as loss_of, torch.set_grad_enabled(not is_sharded):
            output, self._seen = run(weights)
            loss = loss_of(output)
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
    """Sum elements with random signs to 1,024 numbers, whose length and distances are those of `gradient / factor`.

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
        """Return how far loss and gradient may be from those of this module itself, see `StepProof`."""
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
