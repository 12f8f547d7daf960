"""Room 4: losses and weights to the scalar that is minimised."""

from typing import Literal

from torch import Tensor

Reduction = Literal["batch", "weights"]


def weighted_loss(losses: Tensor, weights: Tensor | None = None, reduction: Reduction = "batch") -> Tensor:
    """Reduce the losses of a batch to the weighted objective.

    `batch` is the paper's (Algorithm 1): `sum(w l) / B`. Weights below 1 make the step smaller, too.
    `weights` is `sum(w l) / sum(w)`, which keeps the size of the step.
    Weights that are all 1, or no weights, give `losses.mean()` to the last bit under both.

    Args:
        losses: Losses of the model in training, `[B]`.
        weights: Weights of the same samples, `[B]`; None for the plain mean.
        reduction: The denominator, `batch` or `weights`.

    Returns:
        The scalar to minimise.

    Raises:
        ValueError: If the shapes differ, or `reduction` is neither of the two.

    Example:
        >>> import torch
        >>> losses, weights = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.5])
        >>> weighted_loss(losses, weights), weighted_loss(losses, weights, reduction="weights")
        (tensor(1.2500), tensor(1.6667))
    """
    if reduction not in ("batch", "weights"):
        raise ValueError(
            f"reduction is {reduction!r}; expected 'batch' (sum(w l) / B) or 'weights' (sum(w l) / sum(w))."
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
