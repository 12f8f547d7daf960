"""The numbers behind the measures of images, in plain torch: right guesses, divergence, the hardest samples.

In: logits, targets, losses. Out: a value per sample, or positions. Next: `images.py`.
"""

import math

import torch
from torch import Tensor


def top_k_correct(logits: Tensor, targets: Tensor, k: int = 1) -> Tensor:
    """Tell for logits `[B, C]` whether the target `[B]` is among the `k` largest: booleans `[B]`.

    A row with a NaN is wrong: the network has diverged. With fewer than `k` classes every other row is right.

    >>> top_k_correct(torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]), torch.tensor([0, 2]))
    tensor([ True, False])
    """
    guesses = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (guesses == targets[:, None]).any(dim=1) & ~logits.isnan().any(dim=1)


def kl_divergences(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Compute `KL(reference || now) = sum_c p_c (log p_c - log q_c)` for each sample: nats `[B]`, at least 0.

    p and q are the softmax of the two logits, both `[B, C]`. A class with p = 0 adds nothing.

    >>> kl_divergences(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = reference_logits.log_softmax(dim=1, dtype=dtype), logits.log_softmax(dim=1, dtype=dtype)
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(dim=1).clamp_min(0.0)


def hardest(losses: Tensor, fraction: float = 0.1) -> Tensor:
    """Return the indices of the `ceil(fraction * n)` samples with the highest losses `[n]`, in ascending order.

    NaN counts as the highest. The paper's Table 5 takes a tenth.

    >>> hardest(torch.tensor([0.1, 5.0, 0.2, 4.0]), fraction=0.5)
    tensor([1, 3])
    """
    # Rounded first: 0.1 * 30 is 3.0000000000000004, and 4 of 30 is not a tenth.
    count = math.ceil(round(fraction * losses.numel(), 9))
    return losses.topk(count).indices.sort().values


def mean(values: Tensor) -> float:
    """Return the mean, summed in float64."""
    return values.double().mean().item()
