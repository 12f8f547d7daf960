"""Room 1: model output and targets to one loss per sample."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample, in float32 whatever precision the logits have.

    Args:
        logits: Class scores, `[B, C]`.
        targets: Class indices, `[B]`, integers in `[0, C)`.

    Returns:
        Losses in nats, `[B]`, float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4 for an even guess among four
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(logits if logits.dtype.itemsize >= 4 else logits.float(), targets, reduction="none")
