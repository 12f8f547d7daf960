"""The losses that somebody else's code computes, seen and weighted sample by sample as they are computed.

In: a call of a torch loss, made anywhere. Out: the same reduction over weighted elements. Next: `weights.py`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flow_lightning.method.objective import uniform

#: All losses of `torch.nn.functional`, what has a `reduction`: their arguments in order, with defaults.
LOSSES: dict[Any, dict[str, Any]] = {
    function: {argument.name: argument.default for argument in inspect.signature(function).parameters.values()}
    for name, function in vars(F).items()
    if inspect.isfunction(function) and name[0] != "_" and "reduction" in inspect.signature(function).parameters
}


@dataclass
class Term:
    """One call of a loss.

    Attributes:
        name: The function, such as `cross_entropy`.
        losses: Its elements, `[N, ...]` float32 or float64, before the weights.
        counts: What each element adds to the denominator of a mean, like `losses`: 0 where it is ignored.
        rows: Rows of `losses` that belong to one sample: N / B; 0 if N is no multiple of B.
        input: The first argument.
        target: The second one.
    """

    name: str
    losses: Tensor
    counts: Tensor
    rows: int
    input: Tensor
    target: Any

    def per_sample(self, values: Tensor) -> Tensor:
        """Sum values like `losses` over the elements of each sample, `[B]`."""
        return values.reshape(values.shape[0] // self.rows, -1).sum(dim=1)


class Interception(TorchFunctionMode):
    """Weigh the losses of `torch.nn.functional` while it is active, whoever calls them.

    A mean of losses stays the mean that it was, with each element multiplied by the weight of its sample:
    `sum(w l) / denominator`, the denominator as without weights. Elements without reduction are multiplied, too. Losses
    whose first dimension is no multiple of the number of samples are left alone.

    Args:
        size: B, the number of samples in the batch.
        weights: Their weights, `[B]`; None for weights of 1.
        name: Weigh only losses of this name; None for all.
        is_noting: Whether to keep all calls in `terms`; without weights their elements are leaves, to score them.
        alone: Which calls of a step have elements without the batch's dimension: name, number of the call, shape. Noted
            here, so that they are left alone in a batch whose size happens to divide them, too.
        is_signed: Whether each element gets a random sign. What is summed does not cancel then: its size shows.

    Example:
        >>> logits, targets = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> with Interception(size=2, weights=torch.tensor([1.0, 0.5])):
        ...     F.cross_entropy(logits, targets)  # 0.75 log 4
        tensor(1.0397)
    """

    def __init__(
        self,
        size: int,
        weights: Tensor | None = None,
        name: str | None = None,
        is_noting: bool = False,
        alone: set[tuple[Any, ...]] | None = None,
        is_signed: bool = False,
    ) -> None:
        super().__init__()
        self.alone, self.is_signed = set() if alone is None else alone, is_signed
        self.calls = 0  #: losses that were seen
        self.size, self.weights, self.name, self.is_noting = size, weights, name, is_noting
        self.terms: list[Term] = []
        self.weighed = 0  #: losses that were weighed
        self.rows: dict[str, set[int]] = {}  #: how many rows of each of them belong to one sample
        self.left_alone: dict[str, tuple[int, ...]] = {}  #: shapes of losses without the batch's dimension
        self.is_paused = False  #: whether all losses are left as they are

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Weigh a loss; call anything else as it is."""
        if func not in LOSSES:  # first: it costs each call of torch
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if self.is_paused or self.name not in (None, func.__name__):
            return func(*args, **kwargs)
        arguments = {**LOSSES[func], **dict(zip(LOSSES[func], args)), **kwargs}
        reduction = _reduction(arguments)
        elements = func(**arguments)
        self.calls += 1
        call = func.__name__, self.calls, tuple(elements.shape)
        if elements.ndim == 0 or elements.shape[0] == 0 or elements.shape[0] % self.size or call in self.alone:
            self.alone.add(call)
            self.left_alone[func.__name__] = tuple(elements.shape)
            return func(*args, **kwargs)
        losses, counts = _elements(func, arguments, elements, reduction)
        first, target, *_ = arguments.values()
        weighted = self._weigh(func.__name__, losses, counts, first, target)
        return _reduce(weighted, counts, reduction, arguments).to(elements.dtype)

    def weigh(self, compute: Callable[[], Tensor]) -> Tensor:
        """Weigh losses `[B]` that a function computes, and leave those alone of which it makes them."""
        self.is_paused = True
        try:
            losses = compute()
        finally:
            self.is_paused = False
        return self._weigh("sample_losses", losses, torch.ones_like(losses), losses, None)

    def _weigh(self, name: str, losses: Tensor, counts: Tensor, first: Any, target: Any) -> Tensor:
        self.weighed += 1
        rows = losses.shape[0] // self.size
        self.rows.setdefault(name, set()).add(rows)
        if self.is_noting:
            losses = losses.detach().requires_grad_() if self.weights is None else losses
            self.terms.append(Term(name, losses, counts, rows, first, target))
        if self.is_signed:
            numbers = torch.arange(losses.numel(), device=losses.device).view_as(losses)
            losses = torch.where(uniform(numbers, seed=0) < 0.5, losses, -losses)
        if self.weights is None:
            return losses.clone()  # the caller may change them in place
        weights = self.weights.to(losses.device).repeat_interleave(rows)
        return losses * weights.view(-1, *[1] * (losses.ndim - 1))


def sample_losses(loss: Tensor, interception: Interception) -> Tensor:
    """Compute the loss of each sample from the loss that somebody else's code made of intercepted elements.

    The loss is a linear function of the elements, `sum_e a_e l_e + rest`, whatever that code does with them: masks,
    means, factors of several terms. Of one term, the loss of a sample is the mean of its own elements, weighted by `a`.
    So it does not depend on how many elements (tokens, pixels) other samples have. Further terms are added with their
    factor relative to the first one, `sum a / sum a_first`.

    Args:
        loss: Scalar, made while `interception` was noting.
        interception: Holds the elements.

    Returns:
        `[B]`, float32.

    Raises:
        ValueError: If none of the elements is part of the loss.
    """
    terms = interception.terms
    shares = torch.autograd.grad(loss, [term.losses for term in terms], allow_unused=True) if loss.requires_grad else ()
    used = [(term, share) for term, share in zip(terms, shares) if share is not None]
    if not used:
        raise ValueError(describe(interception))
    total, first = torch.zeros(()), 0.0
    for term, share in used:
        own, count = term.per_sample(share * term.losses.detach()), term.per_sample(share * term.counts)
        factor = float(count.sum())
        first = first or factor or 1.0
        total = total.to(own.device) + factor / first * torch.where(
            count == 0, 0.0, own / torch.where(count == 0, 1.0, count)
        )
    return total.detach().float()


def describe(interception: Interception) -> str:
    """Say what was seen of the losses of a batch, where that is not enough to weigh it."""
    if interception.left_alone:
        shapes = ", ".join(f"{name} of shape {list(shape)}" for name, shape in interception.left_alone.items())
        return f"The batch has {interception.size} samples, but its losses are {shapes}, which is no multiple of that."
    seen = ", ".join(sorted(interception.rows)) or "none"
    return f"Of the losses that were seen ({seen}), none is part of the loss of the batch."


def _reduction(arguments: dict[str, Any]) -> str:
    """Take the reduction out of the arguments of a loss, the deprecated ways to give one, too."""
    reduction: str = arguments["reduction"]
    average, reduce = (arguments.pop(name, None) for name in ("size_average", "reduce"))
    if average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if average is False else "mean"
    arguments["reduction"] = "none"
    return reduction


def _elements(
    function: Callable[..., Tensor], arguments: dict[str, Any], elements: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Return the elements of a loss, at least float32, and what each adds to the denominator of its mean."""
    losses = elements if elements.dtype.itemsize >= 4 else elements.float()
    counts = torch.ones_like(losses)
    if function in (F.cross_entropy, F.nll_loss, getattr(F, "linear_cross_entropy", None)):
        target, weight = arguments["target"], arguments.get("weight")
        if not target.is_floating_point():
            ignored = target == (-100 if arguments["ignore_index"] is None else arguments["ignore_index"])
            if weight is not None:
                counts = weight.to(losses.dtype)[target.masked_fill(ignored, 0)]
            counts = counts.masked_fill(ignored, 0).reshape(losses.shape)
    elif function is F.mse_loss and arguments.get("weight") is not None:
        counts = arguments["weight"].to(losses.dtype)
    elif function is F.ctc_loss and reduction == "mean":
        lengths = torch.as_tensor(arguments["target_lengths"], device=losses.device)
        losses = losses / lengths.clamp_min(1)
    return losses, counts


def _reduce(losses: Tensor, counts: Tensor, reduction: str, arguments: dict[str, Any]) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "mean":
        return losses.sum() / counts.sum()
    return losses.sum() / (len(arguments["input"]) if reduction == "batchmean" else 1)
