"""The numbers behind the measures of images, in plain torch: right guesses, divergence, the hardest samples.

In: logits, targets, losses. Out: a value per sample, or positions. Next: `images.py`.
"""

import math

import torch
from torch import Tensor


def top_k_correct(logits: Tensor, targets: Tensor, k: int = 1) -> Tensor:
    """Return for each sample whether its target is among the `k` largest logits.

    A row with a NaN is wrong: the network has diverged. With fewer than `k` classes every other row is right.

    Args:
        logits: Scores `[B, C]`.
        targets: Class indices `[B]`.
        k: How many guesses a sample has, at least 1.

    Returns:
        Booleans `[B]`.

    Raises:
        ValueError: If the shapes do not belong together or `k` is below 1.

    >>> top_k_correct(torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]), torch.tensor([0, 2]))
    tensor([ True, False])
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        got = f"logits {list(logits.shape)} and targets {list(targets.shape)}"
        raise ValueError(f"Got {got}, expected [B, C] and [B]: pass one class index for each row of logits.")
    if k < 1:
        raise ValueError(f"Got k={k}, expected at least 1: use k=1 for plain accuracy.")
    guesses = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (guesses == targets[:, None]).any(dim=1) & ~logits.isnan().any(dim=1)


def kl_divergences(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Compute `KL(reference || now) = sum_c p_c (log p_c - log q_c)` for each sample.

    Here p is the softmax of the reference's logits and q that of the model's. It is computed in float32, or in float64
    for such input. A class with p = 0 adds nothing.

    Args:
        reference_logits: Scores of the reference model `[B, C]`; log-probabilities do as well.
        logits: Scores of the model now `[B, C]`.

    Returns:
        Divergences `[B]` in nats, at least 0.

    >>> kl_divergences(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    dtype = torch.promote_types(torch.promote_types(reference_logits.dtype, logits.dtype), torch.float32)
    log_p = reference_logits.to(dtype).log_softmax(dim=1)
    log_q = logits.to(dtype).log_softmax(dim=1)
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(dim=1).clamp_min(0.0)


def hardest(losses: Tensor, fraction: float = 0.1) -> Tensor:
    """Return the indices of the `ceil(fraction * n)` samples with the highest losses, in ascending order.

    The paper's Table 5 takes the tenth of the target test set with the highest loss before fine-tuning.

    Args:
        losses: One loss per sample `[n]`; NaN counts as the highest.
        fraction: Share of the samples, in (0, 1].

    Returns:
        Indices, at least one.

    Raises:
        ValueError: If there are no losses or `fraction` is outside (0, 1].

    >>> hardest(torch.tensor([0.1, 5.0, 0.2, 4.0]), fraction=0.5)
    tensor([1, 3])
    """
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(f"Got losses of shape {list(losses.shape)}, expected [n] with n > 0: pass one per sample.")
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"Got fraction={fraction}, expected a number in (0, 1], such as 0.1 for the hardest tenth.")
    # Rounded first: 0.1 * 30 is 3.0000000000000004, and 4 of 30 is not a tenth.
    count = max(1, math.ceil(round(fraction * losses.numel(), 9)))
    return losses.topk(count).indices.sort().values


def mean(values: Tensor) -> float:
    """Return the mean, summed in float64."""
    return values.double().mean().item()
