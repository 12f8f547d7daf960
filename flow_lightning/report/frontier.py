"""The trade between learning and forgetting: what a set of runs reaches, and how two methods compare.

In: points (one for each fit and place on its path). Out: curves, targets under a budget, areas between curves.
Next: `pictures.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Interval = tuple[float, float, float]  #: mean, lower and upper end
_RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One model: a fit of a method, at one place of its path.

    Attributes:
        method: Its name.
        seed: The seed; methods are compared seed by seed.
        rate: Learning rate.
        alpha: Place on the path from the pre-trained weights (0) to the fine-tuned ones (1).
        target: Target accuracy on the test set, or probability of the right tokens, a fraction.
        retention: Share of what the pre-trained model could that is kept, 1 for all of it.
        chosen_by: The same two numbers on data for choosing: a split of the training set, a half of the retention set.
        is_chosen: Whether the fit's budget chose this point.
        hard: Target accuracy on the tenth of the test images that were hardest before training; NaN if not measured.
    """

    method: str
    seed: int
    rate: float
    alpha: float
    target: float
    retention: float
    chosen_by: tuple[float, float]
    is_chosen: bool = False
    hard: float = float("nan")


def frontier(points: Sequence[Point]) -> Curve:
    """Return the best target at each retention, by mixing neighbours.

    The data for choosing say which points these are: those on the upper concave hull. Their numbers on the other data
    are returned, each in order, so that a target never rises with the retention (a rearrangement, Chernozhukov et al.,
    arXiv 0704.3649). A hull of these numbers themselves would take the luckiest.

    Args:
        points: At least one.

    Returns:
        Retentions, ascending, and targets, descending: `[k]` each.

    Example:
        >>> at = lambda r, t: Point("flow", 0, 0.1, 1.0, t, r, (t, r))
        >>> frontier([at(1.0, 0.5), at(0.9, 0.8), at(0.95, 0.5)])
        (array([0.9, 1. ]), array([0.8, 0.5]))
    """
    hull: list[Point] = []
    for point in sorted(points, key=lambda point: point.chosen_by[::-1]):
        while hull and hull[-1].chosen_by[1] == point.chosen_by[1]:  # as much is kept for a lower target
            hull.pop()
        while len(hull) > 1 and _turns_up(*(each.chosen_by[::-1] for each in (hull[-2], hull[-1], point))):
            hull.pop()
        hull.append(point)
    best = max(range(len(hull)), key=lambda i: hull[i].chosen_by)
    kept = np.sort([point.retention for point in hull[best:]])
    targets = np.sort([point.target for point in hull[best:]])[::-1]
    best_of_target = np.append(targets[1:] != targets[:-1], True)  # the one that keeps most
    kept, targets = kept[best_of_target], targets[best_of_target]
    best_of_kept = np.append(True, kept[1:] != kept[:-1])
    return kept[best_of_kept], targets[best_of_kept]


def target_at(points: Sequence[Point], keep: float) -> float:
    """Return the test accuracy of the point that is chosen under a budget.

    Of the points that keep at least `keep` on the data for choosing, the one with the best target there is taken.

    Args:
        points: Of one method and seed.
        keep: The budget, a retention.

    Returns:
        A fraction; NaN if no point keeps that much.
    """
    allowed = [point for point in points if point.chosen_by[1] >= keep]
    return max(allowed, key=lambda point: point.chosen_by[0]).target if allowed else float("nan")


def retention_at(points: Sequence[Point], target: float) -> float:
    """Return the retention of the point that keeps most among those that reach a target, chosen like `target_at`.

    Args:
        points: Of one method and seed.
        target: The accuracy to reach, on the data for choosing.

    Returns:
        A share; NaN if no point reaches the target.
    """
    allowed = [point for point in points if point.chosen_by[0] >= target]
    return max(allowed, key=lambda point: point.chosen_by[1]).retention if allowed else float("nan")


def area_between(ours: Curve, theirs: Curve) -> float:
    """Return by how much more the first curve keeps, on average over the targets that both reach.

    It is the difference of the areas under both as functions of the target, divided by the range of targets. BD-rate
    does so with polynomials in place of lines (Bjontegaard, "Calculation of average PSNR differences between
    RD-curves", VCEG-M33, 2001).

    Args:
        ours: The first curve, from `frontier`.
        theirs: The second one.

    Returns:
        A difference of retentions; NaN if no target is reached by both.

    Example:
        >>> better, worse = np.array([0.9, 1.0]), np.array([0.8, 0.9])
        >>> round(area_between((better, np.array([0.8, 0.5])), (worse, np.array([0.8, 0.5]))), 6)
        0.1
    """
    low, high = max(ours[1].min(), theirs[1].min()), min(ours[1].max(), theirs[1].max())
    if not low < high:
        return float("nan")
    targets = np.unique(np.concatenate([ours[1], theirs[1], [low, high]]).clip(low, high))
    # Targets descend along a curve; `interp` wants them ascending.
    gaps = np.interp(targets, ours[1][::-1], ours[0][::-1]) - np.interp(targets, theirs[1][::-1], theirs[0][::-1])
    return float(((gaps[1:] + gaps[:-1]) / 2 * np.diff(targets)).sum() / (high - low))


def bootstrap(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of paired differences, and its percentile bootstrap interval.

    Args:
        values: One difference for each seed; NaN are left out.
        confidence: Of the interval.

    Returns:
        Mean, lower and upper end; NaN for each without a value, and for both ends with one. With three values the
        interval is hardly narrower than from the smallest to the largest: it tells no more than the seeds do.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return float(known.sum()) if len(known) else float("nan"), float("nan"), float("nan")
    drawn = np.random.default_rng(0).choice(known, size=(_RESAMPLES, len(known))).mean(axis=1)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(known.mean()), float(low), float(high)


def compare_methods(points: Sequence[Point], baseline: str) -> dict[str, dict[str, Interval]]:
    """Compare each method with a baseline, seed by seed.

    Args:
        points: Of all methods and seeds.
        baseline: The method that the others are compared with.

    Returns:
        Numbers by method, each as mean, lower and upper end. `target@0.95`, `@0.98` and `@0.99` are test accuracies
        under these budgets. `retention@0.9`, `@0.95` and `@0.99` are at these shares of the best gain of any method
        over the safest point. Methods other than the baseline have `area`, see `area_between`, and `gain@...`, the
        difference of their target and the baseline's.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    seeds = sorted({point.seed for point in points})
    of = {(m, s): [p for p in points if (p.method, p.seed) == (m, s)] for m in methods for s in seeds}
    goals = {seed: _goals([p for p in points if p.seed == seed]) for seed in seeds}
    result: dict[str, dict[str, Interval]] = {}
    for method in methods:
        pairs = [(of[method, seed], of[baseline, seed]) for seed in seeds if of[method, seed] and of[baseline, seed]]
        numbers = result[method] = {}
        for keep in (0.95, 0.98, 0.99):
            numbers[f"target@{keep}"] = bootstrap([target_at(a, keep) for a, _ in pairs])
            if method != baseline:
                numbers[f"gain@{keep}"] = bootstrap([target_at(a, keep) - target_at(b, keep) for a, b in pairs])
        for share in (0.9, 0.95, 0.99):
            numbers[f"retention@{share}"] = bootstrap([retention_at(a, goals[a[0].seed](share)) for a, _ in pairs])
        if method != baseline:
            numbers["area"] = bootstrap([area_between(frontier(a), frontier(b)) for a, b in pairs])
    return result


def _goals(points: Sequence[Point]) -> Callable[[float], float]:
    """Return the target that is a share of the best gain over the safest points, those that keep most."""
    targets = [point.chosen_by[0] for point in points]
    safest = max(points, key=lambda point: (point.chosen_by[1], -point.alpha)).chosen_by[0]
    return lambda share: safest + share * (max(targets) - safest)


def _turns_up(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Tell whether the middle point lies on or below the line from the first to the last."""
    return (middle[0] - first[0]) * (last[1] - first[1]) >= (middle[1] - first[1]) * (last[0] - first[0])
