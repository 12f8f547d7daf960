"""Ridge regression on one-hot labels: a second opinion on each label, whose errors are others than the probe's.

In: features by blocks, targets. Out: probabilities out of fold. Next: `label_errors.py`.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

#: The penalty, as a share of the total variance of the features.
_PENALTY = 0.005
_SCALES = 2.0 ** torch.arange(0, 6.5, 0.5)


def ridge_probabilities(
    blocks: Callable[[Tensor], Iterator[tuple[Tensor, Tensor, Tensor]]],
    parts: Tensor,
    targets: Tensor,
    weights: Tensor,
    classes: int,
) -> Tensor:
    """Compute probabilities of regressions that have not seen the sample's part.

    They are the softmax of the outputs, times the factor for which the weighted cross-entropy is least.

    Args:
        blocks: Yields features `[b, D]` of zero mean, targets and weights `[b]` of given rows, on the device.
        parts: The part of each sample, `[n]`.
        targets: Class indices, `[n]`.
        weights: Of the samples, `[n]`.
        classes: C.

    Returns:
        `[n, C]`, float32, on the CPU.
    """
    total = _sums(blocks, torch.arange(len(parts)), classes)
    outputs = torch.empty(len(parts), classes)
    for part in parts.unique():
        rows = (parts == part).nonzero().flatten()
        gram, products, counts = (whole - own for whole, own in zip(total, _sums(blocks, rows, classes)))
        mean = counts / counts.sum()
        gram.diagonal().add_(_PENALTY * gram.diagonal().sum())
        slopes = torch.linalg.solve(gram, products - products.sum(1, keepdim=True) * mean)  # one-hot rows sum to 1
        outputs[rows] = torch.cat([x @ slopes + mean for x, _, _ in blocks(rows)]).cpu()
    losses = torch.stack([weights @ F.cross_entropy(scale * outputs, targets, reduction="none") for scale in _SCALES])
    return (_SCALES[losses.argmin()] * outputs).softmax(1)


def _sums(
    blocks: Callable[[Tensor], Iterator[tuple[Tensor, Tensor, Tensor]]], rows: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sums of `x x'` `[D, D]`, `x y'` `[D, C]` and `y` `[C]` over rows, y the one-hot targets."""
    sums = [torch.zeros(())] * 3
    for x, y, w in blocks(rows):
        one_hot, weighted = F.one_hot(y, classes).float(), w[:, None] * x
        products = weighted.T @ x, weighted.T @ one_hot, w @ one_hot
        sums = [known.to(new) + new for known, new in zip(sums, products)]
    return sums[0], sums[1], sums[2]
