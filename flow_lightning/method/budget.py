"""The budget on forgetting: how much a fine-tuned model surely keeps of what the pre-trained one did.

In: what both did on the same samples. Out: the share kept and its lower bound, and the last point of a path that keeps
the budget. Next: `callbacks/retention_budget.py`.

Samples count as independent draws from what the model is to keep. The bounds are exact for accuracy and agreement of
images; for texts they are approximate.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

#: The part of the allowed error that `net_p_value` spends on its nuisance parameter.
_NUISANCE = 1 / 500
_RESAMPLES = 2000
#: Fewer texts than this tell too little of how texts differ for a bootstrap.
_FEWEST_TEXTS = 30


class Kept(NamedTuple):
    """The share of what the pre-trained model did that a model still does."""

    share: float  #: as measured
    bound: float  #: with the confidence that was asked for, the true share is at least this


def agreement_kept(before: Tensor, after: Tensor, confidence: float) -> Kept:
    """Compare answers: the share is that of equal ones, bounded by Clopper and Pearson.

    Tokens of one text flip together. So of texts the bound counts as many independent tokens as would give the share
    the same standard error (Korn and Graubard 1998). In simulations it holds less often than promised if a text flips
    as a whole, or is one of only 30.

    Args:
        before: Classes that the pre-trained model chose, `[n]`; for texts tokens, `[n, T]`, -1 where there is none.
        after: Those that the other model chose.
        confidence: Of the bound.

    >>> agreement_kept(torch.zeros(513), torch.tensor([1] * 4 + [0] * 509), 0.95).bound > 0.98
    True
    """
    asked = before >= 0 if before.ndim == 2 else torch.ones_like(before, dtype=torch.bool)
    flipped = asked & (before != after)
    flips, n = int(flipped.sum()), int(asked.sum())
    share = 1 - flips / n
    if before.ndim == 2 and 0 < flips < n:
        rate, error = map(float, _mean_and_error(_sums(flipped.sum(1), asked.sum(1)).sum(0)))
        z = NormalDist().inv_cdf(confidence)
        student = 1 + (z**2 + 1) / (4 * max(1, len(before) - 1))  # its quantile over that of the normal distribution
        n = max(1, int(min(n, rate * (1 - rate) / max(error, 1e-150) ** 2) / student**2))
        flips = math.ceil(rate * n)
    return Kept(share, 1 - upper_bound(flips, n, confidence))


def accuracy_kept(before: Tensor, after: Tensor, confidence: float) -> Kept:
    """Compare right answers: the share is accuracy after / accuracy before, gains counted.

    The bound is the largest share of which `net_p_value` shows that the model does not keep less.

    Args:
        before: 1 where the pre-trained model is right, else 0, `[n]`.
        after: The same of the other model.
        confidence: Of the bound.
    """
    right, now = before.bool(), after.bool()
    lost, gained, relevant = int((right & ~now).sum()), int((~right & now).sum()), int((right | now).sum())
    if not right.any():
        return Kept(0.0, 0.0)
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        refused = net_p_value(relevant, lost, gained, middle, confidence) <= 1 - confidence
        low, high = (middle, high) if refused else (low, middle)
    return Kept(int(now.sum()) / int(right.sum()), low)


def perplexity_kept(before: Tensor, after: Tensor, confidence: float) -> Kept:
    """Compare losses of texts: the share is perplexity before / perplexity after.

    The bound is that of a bootstrap over the texts (bootstrap-t, Efron and Tibshirani 1993, chapter 12), with 2,000
    resamples of a fixed seed. It looks at the difference of the losses in each text, so that it does not matter how
    much texts differ from each other. `before` and `after` are the sum of the token losses in nats, and the number of
    tokens, of each text, `[n, 2]`.
    """
    worse, tokens = after[:, 0] - before[:, 0], before[:, 1]
    if not torch.isfinite(worse).all():  # it has diverged
        return Kept(0.0, 0.0)
    if len(worse) < _FEWEST_TEXTS:
        return Kept(math.exp(-worse.sum() / tokens.sum()), 0.0)
    columns = _sums(worse, tokens)
    draws = np.random.default_rng(0).multinomial(len(worse), [1 / len(worse)] * len(worse), _RESAMPLES)
    mean, error = _mean_and_error(columns.sum(0))
    means, errors = _mean_and_error((draws @ columns).T)
    t = (means - mean) / np.maximum(errors, 1e-300)
    worst = mean - np.quantile(t, 1 - confidence) * error
    return Kept(math.exp(-mean), min(1.0, math.exp(-worst)) if error else math.exp(-mean))


#: How outcomes of the pre-trained model and of another are compared, by what the budget is on.
COMPARISONS: dict[str, Callable[[Tensor, Tensor, float], Kept]] = {
    "accuracy": accuracy_kept,
    "agreement": agreement_kept,
    "perplexity": perplexity_kept,
}


def last_kept(bounds: Sequence[float], keep: float) -> int:
    """Return the last point that surely keeps the budget, -1 if none does, by fixed-sequence testing.

    The points are tested in their order, from the safest on, each with the full confidence. The first whose bound is
    below `keep` ends it, whatever comes behind. So only the first truly bad point can be chosen wrongly, and no
    correction for the number of points is needed.

    >>> last_kept([0.999, 0.985, 0.97, 0.99], keep=0.98)
    1
    """
    return next((order for order, bound in enumerate(bounds) if bound < keep), len(bounds)) - 1


def samples_needed(keep: float, confidence: float, of: str = "agreement", texts: bool = False) -> int:
    """Return how many samples show that `keep` is kept if no answer changes: `log(1 - confidence) / log(keep)`.

    For accuracy only samples count that the pre-trained model has right. A change or two needs about twice as many. For
    texts it is 30: fewer tell a bootstrap too little.

    Args:
        keep: The budget, in (0, 1).
        confidence: Of the bound, in (0, 1).
        of: What is kept: `accuracy`, `agreement` or `perplexity`.
        texts: Whether the samples are texts.

    >>> samples_needed(0.98, 0.95)
    149
    """
    if texts or of == "perplexity":
        return _FEWEST_TEXTS
    n = math.ceil(round(math.log(1 - confidence) / math.log(keep), 9))
    while of == "accuracy" and net_p_value(n, 0, 0, keep, confidence) > 1 - confidence:
        n += 1
    return n


def check_size(
    found: int, keep: float, confidence: float, of: str = "agreement", texts: bool = False, what: str = "samples"
) -> None:
    """Refuse, with a ValueError that says of `what`, fewer than `samples_needed`, whose arguments the others are."""
    if found < (needed := samples_needed(keep, confidence, of, texts)):
        raise ValueError(
            f"To keep {keep:.4g} with confidence {confidence:.4g}, the half of the retention set that chooses needs at "
            f"least {needed} {what}; it has {found}. Give more data, or lower keep or confidence."
        )


def upper_bound(events: int, n: int, confidence: float) -> float:
    """Return the upper bound of Clopper and Pearson (1934) on the rate of events, of which `n` samples had some.

    It is the largest rate at which so few events have a probability of `1 - confidence`.

    >>> round(upper_bound(0, 149, 0.95), 4)
    0.0199
    """
    if events >= n:
        return 1.0
    low, high = events / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        likely = _binomial_cdf(np.array([events]), np.array([n]), middle)[0] > 1 - confidence
        low, high = (middle, high) if likely else (low, middle)
    return high


def net_p_value(relevant: int, lost: int, gained: int, keep: float, confidence: float = 0.95) -> float:
    """Test whether accuracy after is below `keep` times accuracy before, from paired answers: an exact p-value.

    The test is conditional on the samples that one of the two models has right (`relevant`); others tell nothing of the
    ratio. Of them, rates `p` are lost and `g` gained, and the ratio is `keep` where `p = (1 - keep) + keep * g`. The
    test orders outcomes by `(lost - keep * gained - (1 - keep) * relevant) / its standard deviation`, as score tests of
    paired ratios do, and adds the probabilities of all that are as good or better. `g` is unknown. The p-value is the
    largest over its upper confidence range, plus the part in which `g` may lie outside (Berger and Boos 1994).

    Args:
        relevant: Samples that the pre-trained or the other model has right.
        lost: Those that only the pre-trained model has right.
        gained: Those that only the other model has right.
        keep: The share that is to be refused.
        confidence: Of the refusal; the range of `g` is 500 times surer.

    >>> round(net_p_value(relevant=480, lost=10, gained=8, keep=0.98), 3)
    0.059
    """
    if not 0 < keep < 1:
        return 0.0 if keep <= 0 else 1.0
    outside = _NUISANCE * (1 - confidence)
    sure = 1 - outside / 2
    low = 1 - upper_bound(relevant - gained, relevant, sure)
    high = min(upper_bound(gained, relevant, sure), keep / (1 + keep) * (1 - 1e-9))  # above it there is no such p
    if relevant == 0 or low > high:
        return 1.0
    score = (lost - keep * gained - (1 - keep) * relevant) / _deviation(gained, relevant, keep)
    gains = np.arange(relevant + 1)
    most = np.floor(score * _deviation(gains, relevant, keep) + keep * gains + (1 - keep) * relevant + 1e-9)
    worst = 0.0
    for g in np.linspace(low, high, 33):
        weights = np.exp(_log_binomial(gains, np.array([relevant]), g))
        some = (weights > 1e-13) & (most >= 0)
        p = ((1 - keep) + keep * g) / (1 - g)
        below = _binomial_cdf(np.minimum(most, relevant - gains)[some], (relevant - gains)[some], p)
        worst = max(worst, float(weights[some] @ below))
    return min(1.0, worst + outside)


def _deviation(gained: int | Counts, relevant: int, keep: float) -> Array:
    """Return the standard deviation of the statistic where the ratio is `keep`, with `gained / relevant` for g."""
    return np.asarray(np.sqrt(relevant * keep * ((1 - keep) + (1 + keep) * gained / relevant)))


def _log_binomial(k: Counts, n: Counts, p: float) -> Array:
    """Return the logarithm of the binomial probability of k of n, elementwise; `0 * log 0` is 0."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(n.max()) + 1)))])
    choose = factorials[n] - factorials[k] - factorials[n - k]
    yes = k * math.log(p) if p > 0 else np.where(k > 0, -np.inf, 0.0)
    no = (n - k) * math.log1p(-p) if p < 1 else np.where(n > k, -np.inf, 0.0)
    return np.asarray(choose + yes + no)


def _binomial_cdf(k: Array | Counts, n: Counts, p: float) -> Array:
    """Return the probability of at most k of n, elementwise."""
    counts = np.arange(int(k.max(initial=0)) + 1)[None]
    inside = counts <= np.minimum(k, n)[:, None]
    logs = _log_binomial(np.where(inside, counts, 0), n[:, None], p)
    return np.asarray(np.minimum(1.0, np.where(inside, np.exp(logs), 0.0).sum(axis=1)))


def _sums(of_texts: Tensor, of_tokens: Tensor) -> Array:
    """Return the columns `[n, 5]` that `_mean_and_error` needs the sums of: something in each text, and its tokens."""
    worse, tokens = of_texts.double().numpy(), of_tokens.double().numpy()
    return np.stack([worse, tokens, worse**2, worse * tokens, tokens**2], axis=1)


def _mean_and_error(sums: Array) -> tuple[Array, Array]:
    """Return the mean per token and its standard error, from the sums over texts of `_sums`."""
    worse, tokens, worse2, product, tokens2 = sums
    mean = worse / tokens
    return mean, np.sqrt(np.maximum(worse2 - 2 * mean * product + mean**2 * tokens2, 0.0)) / tokens
