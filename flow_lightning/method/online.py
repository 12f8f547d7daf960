"""Weights from the model in training, computed anew at each step, where FLOW's come from the frozen model once.

In: losses of a batch, or its logits. Out: a factor for each loss. Next: `callbacks/online_weights.py`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: EAFT looks at the largest probabilities alone.
_TOP = 20


def probability(losses: Tensor, power: float = 1.0) -> Tensor:
    """Weigh by `p ** power`, p = exp(-l) the probability of the target.

    1 is dynamic fine-tuning (Wu et al., DFT, arXiv 2508.05629). Between 0 and 1 the gradient is that of generalised
    cross-entropy, `(1 - p ** power) / power` (Zhang and Sabuncu, arXiv 1805.07836).

    >>> probability(torch.tensor([0.0, 1.0]), power=0.5)
    tensor([1.0000, 0.6065])
    """
    return (-power * losses).exp()


def adaptive(losses: Tensor, floor: float = 0.01) -> Tensor:
    """Weigh by `max(exp(-l / tau), floor)`, tau the median of these losses (Lin et al., TALR, arXiv 2509.20758).

    >>> adaptive(torch.tensor([0.0, 1.0, 50.0]))
    tensor([1.0000, 0.3679, 0.0100])
    """
    tau = losses.quantile(0.5) if losses.numel() < 2**24 else losses.median()
    return (losses / -tau.clamp_min(1e-12)).exp().clamp_min(floor)


def smallest(losses: Tensor, share: float = 0.7) -> Tensor:
    """Keep the share of smallest losses: weight 1, else 0. At least one loss is kept.

    It is the selection of co-teaching (Han et al., arXiv 1804.06872, Algorithm 1): give 1 - the rate of wrong labels.
    There two models select for each other, and the share falls from 1 over the first epochs; here one model selects,
    with the same share from the start. The mean is over the kept losses with `reduction: weights`, as there. With
    `reduction: batch`, and in other modules, it is over all, so the step is smaller by the share.

    >>> smallest(torch.tensor([3.0, 1.0, 2.0, 4.0]), share=0.5)
    tensor([0., 1., 1., 0.])
    """
    kept = losses.argsort(stable=True)[: max(1, round(share * losses.numel()))]
    return torch.zeros_like(losses).index_fill(0, kept, 1.0)


#: Rules by name: from losses `[K]` and one number to factors `[K]`. A rule of your own goes in here.
RULES: dict[str, Callable[..., Tensor]] = {"probability": probability, "adaptive": adaptive, "smallest": smallest}


@torch.no_grad()
def entropy_gate(logits: Tensor, power: float = 1.0) -> Tensor:
    """Weigh by `(H / log K) ** power`, H the entropy among the K = 20 largest probabilities, or all if fewer.

    A model that is sure of another answer is not made to learn this one (Diao et al., EAFT, arXiv 2601.02151).

    Args:
        logits: `[N, C]`.
        power: Of the gate.

    Returns:
        `[N]` float32, in `[0, 1]`.

    >>> entropy_gate(torch.zeros(1, 4))
    tensor([1.])
    """
    top = logits.float().topk(min(_TOP, logits.shape[1]), dim=1).values.log_softmax(1)
    return (-(top.exp() * top).sum(1) / math.log(max(2, top.shape[1]))).clamp(0, 1) ** power


def rate_factor(running: float, first: float, most: float = 4.0) -> float:
    """Return what the learning rate is multiplied by: `sqrt(first / running)`, at most `most`.

    A step forgets at most in proportion to rate times square root of the loss, so the rate may grow as the loss falls
    (Prashant et al., FINCH, arXiv 2605.20005). In units of the first loss, the first step has the optimizer's rate.

    >>> rate_factor(running=0.5, first=2.0)
    2.0
    """
    return min(most, math.sqrt(first / max(running, 1e-12)))
