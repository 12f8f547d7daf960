"""Losses and weights to the scalar that is minimised.

In: losses and weights of a batch. Out: the objective. Next: `modules/base.py`.
"""

from typing import Literal, get_args

from torch import Tensor

Reduction = Literal["batch", "weights", "sampling"]


def weighted_loss(losses: Tensor, weights: Tensor | None = None, reduction: Reduction = "batch") -> Tensor:
    """Reduce the losses of a batch to the weighted objective.

    `batch` is the paper's (Algorithm 1): `sum(w l) / B`. Weights below 1 make the step smaller, too.
    `weights` is `sum(w l) / sum(w)`, which keeps the size of the step.
    Weights that are all 1, or no weights, give `losses.mean()` to the last bit under both.

    `sampling` estimates `batch` by samples drawn with probability `w` (see `draw`); where all losses are at hand, it is
    `batch`.

    Args:
        losses: Losses of the model in training, `[B]`.
        weights: Weights of the same samples, `[B]`; None for the plain mean.
        reduction: The denominator, `batch`, `weights` or `sampling`.

    Returns:
        The scalar to minimise.

    Raises:
        ValueError: If the shapes differ, or there is no such `reduction`.

    Example:
        >>> import torch
        >>> losses, weights = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.5])
        >>> weighted_loss(losses, weights), weighted_loss(losses, weights, reduction="weights")
        (tensor(1.2500), tensor(1.6667))
    """
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction is {reduction!r}; expected 'batch' (sum(w l) / B), 'weights' (sum(w l) / sum(w)) or 'sampling' "
            "('batch', estimated from samples drawn with probability w)."
        )
    if weights is None:
        return losses.mean()
    if weights.shape != losses.shape:
        raise ValueError(
            f"losses have shape {tuple(losses.shape)} but weights {tuple(weights.shape)}; "
            "expected one weight for each loss."
        )
    loss = (weights * losses).mean()
    if reduction == "weights":
        # n / sum(w) is exactly 1 when all weights are 1; the clamp keeps a batch of vanishing weights finite.
        loss = loss * (weights.numel() / weights.sum().clamp_min(1e-30))
    return loss


def denominator(losses: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor | float:
    """Return what `weighted_loss`, with the same arguments, divides by: the number of terms, or their weights' sum."""
    return weights.sum() if weights is not None and reduction == "weights" else float(losses.numel())


def draw(weights: Tensor, index: Tensor, seed: int) -> Tensor:
    """Draw samples with probability equal to their weight.

    The sum of the drawn samples' losses has the expectation `sum(w l)`; the same holds for the gradients. The cost is
    that of `sum(w)` samples. It adds the variance `sum(w (1 - w) l^2)`.

    Args:
        weights: Weights in `[0, 1]`, `[B]`.
        index: Indices of the samples, `[B]`, on the same device.
        seed: A seed of this epoch. Whether a sample is drawn depends on seed and index alone, so that it does not
            matter how the samples are put into batches and shared by processes.

    Returns:
        Positions of the drawn samples in ascending order, on the device of the weights; possibly none.

    Example:
        >>> import torch
        >>> draw(torch.tensor([1.0, 0.0, 1.0]), torch.arange(3), seed=0)
        tensor([0, 2])
    """
    return (uniform(index, seed) < weights).nonzero().squeeze(1)


def uniform(index: Tensor, seed: int) -> Tensor:
    """Return a random number in `[0, 1)` for each index, from seed and index alone, the same on every device.

    It is the upper 24 bits of output `index` of the generator SplitMix64, which needs no outputs before it (Steele, Lea
    and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

    Args:
        index: Integers from 0, any shape.
        seed: A 64-bit integer.

    Returns:
        float32, of the shape of `index`.
    """
    bits = (index.long() + 1) * _signed(0x9E3779B97F4A7C15) + _signed(seed)  # all of this wraps at 64 bits
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = _shifted(bits ^ _shifted(bits, 31), 40)
    return bits.float() * 2.0**-24


def _signed(number: int) -> int:
    """Return the integer whose lowest 64 bits, read with a sign, are those of `number`."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift int64 to the right with zeros coming in, where `>>` would repeat the sign."""
    return (bits >> by).bitwise_and(2 ** (64 - by) - 1)
