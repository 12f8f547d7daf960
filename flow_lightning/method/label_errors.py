"""Which labels are wrong: confident learning, and the probability that a label is right.

In: probabilities of a model that has not seen the labels. Out: issues, weights. Next: `probe.py`.
"""

import torch
from torch import Tensor

#: How many even samples are mixed into each row of T, see `transition`; with infinity only the share is found.
_EVEN = (torch.inf, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0)
#: T is estimated on at most so many probabilities.
_MOST = 2**21
_ROWS = 65_536
#: Of fewer labels a share tells little.
_FEWEST = 50


def true_classes(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the probabilities of the true classes, given the labels, and the transitions T from classes to labels.

    The model gives a sample's true class the probabilities p. A sample of class c gets the label k with probability
    `T_ck`. So its class is c with the probability `p_c T_cy / sum_k p_k T_ky`, y its label. Which labels a class gets
    comes from all samples. They are even over the classes, unless classes that are often confused predict held-out
    labels better by one standard error. How many are wrong comes from those of which the model is surest: elsewhere
    a hard sample looks like a wrong label. So with hardly any wrong labels the probabilities of the labels are near 1.
    Unlike FLOW's weights, they do not take from samples that are merely hard.

    Args:
        probabilities: p, `[n, C]`, out of fold.
        targets: The given labels, class indices `[n]`.

    Returns:
        Probabilities `[n, C]`, float32, and T, `[C, C]` float64. The column of the label says whether it is right.

    >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.01, 0.99], [0.1, 0.9]])
    >>> true_classes(p, torch.tensor([0, 1, 0, 1]))[0][:, 1].round(decimals=1)
    tensor([0.0000, 0.9000, 1.0000, 1.0000])
    """
    n, classes = probabilities.shape
    some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: max(1, _MOST // classes)].sort().values
    p, y = probabilities[some], targets[some]
    matrix = _with_share(transition(p, y, _choose_even(p, y)), p.double().mean(0), wrong_share(p, y))
    blocks = zip(probabilities.split(_ROWS), targets.split(_ROWS))
    return torch.cat([_given_labels(block, labels, matrix).float() for block, labels in blocks]), matrix


def wrong_share(probabilities: Tensor, targets: Tensor) -> float:
    """Estimate the share of wrong labels: of the tenth of which the model is surest, those with another label.

    At least 50 samples are taken, and at least 1 of 1,000 labels counts as wrong. Where the model is rarely right even
    when it is sure, the share comes out too large.

    >>> wrong_share(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    0.5
    """
    confidences, predicted = probabilities.max(1)
    surest = confidences.topk(min(len(targets), max(_FEWEST, len(targets) // 10))).indices
    return max(1e-3, float((predicted[surest] != targets[surest]).double().mean()))


def _with_share(matrix: Tensor, classes: Tensor, share: float) -> Tensor:
    """Return T with this share of wrong labels, by one factor on all of them; `classes` says how often each is."""
    diagonal = matrix.diagonal()
    wrong = ((1 - diagonal) * share / float(classes @ (1 - diagonal))).clamp_max(0.9)
    rest = (matrix - diagonal.diag()) / (1 - diagonal)[:, None]
    return rest * wrong[:, None] + (1 - wrong).diag()


def right_labels(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the probability that each label is right, `[n]`, and T; see `true_classes`."""
    classes, matrix = true_classes(probabilities, targets)
    return of_labels(classes, targets), matrix


def of_labels(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the probability of each label, `[n]`, of those of all classes, `[n, C]`."""
    return probabilities.gather(1, targets[:, None]).squeeze(1)


def transition(
    probabilities: Tensor, targets: Tensor, even: float, steps: int = 60, start: Tensor | None = None
) -> Tensor:
    """Estimate how often a true class gets each label, `[C, C]` float64, by expectation and maximisation.

    Source: Dawid and Skene, "Maximum likelihood estimation of observer error-rates", 1979, with one observer.

    Args:
        probabilities: Of the true classes, `[n, C]`.
        targets: The given labels, `[n]`.
        even: Each row has so many samples more, with the share of wrong labels of all, even over the other classes.
        steps: Rounds.
        start: T to begin with; by default 30 % of the labels are wrong, evenly.

    >>> p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> transition(p, torch.tensor([0, 1, 1, 1]), even=torch.inf).diagonal()
    tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    classes = probabilities.shape[1]
    right = torch.eye(classes, dtype=torch.float64)
    wrong = (1 - right) / max(1, classes - 1)
    matrix = 0.7 * right + 0.3 * wrong if start is None else start
    for _ in range(steps):
        counts = torch.zeros_like(right).index_add_(1, targets, _given_labels(probabilities, targets, matrix).T)
        share = max(1e-3, 1 - float(counts.trace()) / len(targets))  # of 0 it would never rise again
        prior = (1 - share) * right + share * wrong
        matrix = prior if even == torch.inf else (counts + even * prior) / (counts.sum(1, keepdim=True) + even)
    return matrix


def _given_labels(probabilities: Tensor, targets: Tensor, matrix: Tensor) -> Tensor:
    """Return the probability of each true class, given the label, `[n, C]` float64."""
    joint = probabilities.double() * matrix.T[targets]
    return joint / joint.sum(1, keepdim=True).clamp_min(1e-300)


def _choose_even(probabilities: Tensor, targets: Tensor) -> float:
    """Choose the most even transitions within one standard error of the best, by likelihood of held-out labels."""
    parts, found = stratified_parts(targets, 5), torch.empty(len(_EVEN), len(targets), dtype=torch.float64)
    for part in range(5):
        own, rest, matrix = parts == part, parts != part, None
        for row, even in zip(found, _EVEN):
            matrix = transition(probabilities[rest], targets[rest], even, 60 if matrix is None else 20, matrix)
            row[own] = (probabilities[own].double() * matrix.T[targets[own]]).sum(1).clamp_min(1e-300).log()
    behind = found[found.mean(1).argmax()] - found
    error = behind.std(1, correction=0) / len(targets) ** 0.5
    return next(even for even, mean, one in zip(_EVEN, behind.mean(1), error) if mean <= one)


def stratified_parts(targets: Tensor, parts: int) -> Tensor:
    """Divide samples into equal parts with equal shares of each class, by index alone: the same on every run.

    Targets are class indices `[n]`; returns the part of each sample, `[n]`, integers in `[0, parts)`.

    >>> stratified_parts(torch.tensor([0, 1, 0, 1, 0, 1]), 3)
    tensor([1, 2, 0, 1, 2, 0])
    """
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    order = shuffled[targets[shuffled].argsort(stable=True)]
    part = torch.empty(len(targets), dtype=torch.long)
    part[order] = torch.arange(len(targets)) % parts
    return part


def thresholds(losses: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Return how sure the model is of each class, `[C]`: its mean probability of the label, over samples of that label.

    >>> thresholds(torch.tensor([0.0, 0.0]), torch.tensor([0, 0]), 2)
    tensor([1., inf])
    """
    counts = torch.bincount(targets, minlength=num_classes)
    sums = torch.zeros(num_classes).index_add(0, targets, (-losses).exp())
    return torch.where(counts > 0, sums / counts, torch.inf)


def label_issues(logits: Tensor, targets: Tensor, thresholds: Tensor) -> Tensor:
    """Tell which labels look wrong, by confident learning (Northcutt et al., arXiv 1911.00068), `[n]` bool.

    The model is confident of the classes whose probability reaches their threshold. A label is an issue if the most
    likely of these is another one, an entry off the diagonal of the confident joint, and the model answers otherwise.

    Args:
        logits: `[n, C]`, out of fold: a model that has seen the labels finds none of them wrong.
        targets: Class indices, `[n]`.
        thresholds: See there, `[C]`.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.1, 0.0]])
    >>> label_issues(logits, torch.tensor([0, 1, 1]), torch.tensor([0.8, 0.4]))
    tensor([False,  True, False])
    """
    probabilities = logits.float().softmax(1)
    confident = torch.where(probabilities >= thresholds - 1e-6, probabilities, -1.0)
    most, likely = confident.max(1)
    return (most > 0) & (likely != targets) & (logits.argmax(1) != targets)
