"""The picture of a board: target against retention, with the frontier of each method.

In: points. Out: a PNG. Next: `compare.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from flow_lightning.report.frontier import Point, bootstrap, frontier
from flow_lightning.report.pictures import COLOURS, GREY, MARKERS, picture

_BUDGETS = (0.95, 0.98, 0.99)


def plot_frontier(points: Sequence[Point], path: str | Path) -> None:
    """Draw models as dots, each method's frontier as a line, the mean over seeds, and budgets as dashed lines.

    Models far below all frontiers are outside of the picture. With several seeds the line is the mean of their
    frontiers, and the band is its 95 % bootstrap interval over seeds, where all seeds have a frontier.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    with picture(path, [6.5], 4.6) as (figure, axes):
        place = next(axes)
        for order, method in enumerate(methods):
            mine = [point for point in points if point.method == method]
            _draw_method(place, mine, COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)])
        corners = np.concatenate([line.get_xydata() for line in place.lines if line.get_linestyle() == "-"])
        (left, low), (right, high) = corners.min(axis=0), corners.max(axis=0)
        width, height = max(right - left, 2.0), max(high - low, 2.0)
        place.set(xlim=(left - 0.15 * width, right + 0.05 * width), ylim=(low - 0.3 * height, high + 0.15 * height))
        for budget in _BUDGETS:
            place.axvline(100 * budget, color=GREY, linestyle="--", linewidth=1, zorder=0)
        place.plot([], [], color=GREY, linestyle="--", linewidth=1, label="budgets of 95, 98, 99 %")
        place.set(xlabel="kept (% of before)", ylabel="target accuracy (%)", title="Up and right is better")
        place.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=min(len(methods) + 1, 4), frameon=False)


def _draw_method(axes: Axes, points: Sequence[Point], colour: str, marker: str) -> None:
    x, y = (100 * np.array([getattr(point, name) for point in points]) for name in ("retention", "target"))
    axes.plot(x, y, marker, color=colour, markersize=4, alpha=0.4, markeredgewidth=0)
    by_seed: Mapping[int, list[Point]] = {point.seed: [] for point in points}
    for point in points:
        by_seed[point.seed].append(point)
    curves = [frontier(of_seed) for of_seed in by_seed.values()]
    low, high = max(curve[0].min() for curve in curves), min(curve[0].max() for curve in curves)
    if len(curves) == 1 or not low < high:
        low, high = min(curve[0].min() for curve in curves), max(curve[0].max() for curve in curves)
    grid = np.linspace(low, high, 200)
    targets = np.stack([np.interp(grid, *curve) for curve in curves])
    axes.plot(100 * grid, 100 * targets.mean(axis=0), color=colour, linewidth=1.8, label=points[0].method)
    if len(curves) > 1:
        _, low, high = np.array([bootstrap(column) for column in 100 * targets.T]).T
        axes.fill_between(100 * grid, low, high, color=colour, alpha=0.12)
