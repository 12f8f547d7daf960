"""The picture of a board: target against retention, with the frontier of each method.

In: points. Out: a PNG. Next: `compare.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from flow_lightning.report.frontier import Point, bootstrap, frontier
from flow_lightning.report.pictures import COLOURS, GREY, MARKERS, picture

_RING: dict[str, Any] = {
    "markersize": 14,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
    "markeredgewidth": 1.5,
}


def plot_frontier(
    panels: Mapping[str, Sequence[Point]], path: str | Path, budgets: Iterable[float], target_of: str = "accuracy"
) -> None:
    """Draw models as dots, each method's frontier as a line, the mean over seeds, and budgets as dashed lines.

    Models far below all frontiers are outside of the picture. With several seeds the line is the mean of their
    frontiers, and the band is its 95 % bootstrap interval over seeds, where all seeds have a frontier. The line of a
    single fit is its whole path. A ring is the point that a fit's budget chose.

    Args:
        panels: Points by the title of their panel. All panels have the same axes.
        path: The PNG.
        budgets: Retentions to mark.
        target_of: What the target is measured by: accuracy, or token probability.
    """
    methods, budgets = list(dict.fromkeys(p.method for points in panels.values() for p in points)), sorted({*budgets})
    with picture(path, [6.5] if len(panels) == 1 else [4.4] * len(panels), 4.6) as (figure, every):
        places = [next(every) for _ in panels]
        for place, (title, points) in zip(places, panels.items()):
            for order, method in enumerate(methods):
                if mine := [point for point in points if point.method == method]:
                    _draw_method(place, mine, COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)])
            place.set(xlabel="kept (% of before)", title=title or "Up and right is better")
            place.grid(alpha=0.25)
        limits = _limits([line.get_xydata() for place in places for line in place.lines if line.get_linestyle() == "-"])
        for place in places:
            place.set(**limits)
            for budget in budgets:
                place.axvline(100 * budget, color=GREY, linestyle="--", linewidth=1, zorder=0)
        places[0].set_ylabel(f"target {target_of} (%)")
        shares = ", ".join(f"{100 * budget:g}" for budget in budgets)
        label = f"budget{'s' if len(budgets) > 1 else ''} of {shares} %"
        places[0].plot([], [], color=GREY, linestyle="--", linewidth=1, label=label)
        if any(point.is_chosen for points in panels.values() for point in points):
            places[0].plot([], [], "o", **_RING, label="chosen within the budget")
        handles = {t: h for place in places for h, t in zip(*place.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)


def _limits(lines: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Return limits of both axes with room around all lines."""
    corners = np.concatenate(lines)
    (left, low), (right, high) = corners.min(axis=0), corners.max(axis=0)
    width, height = max(right - left, 2.0), max(high - low, 2.0)
    return {
        "xlim": (left - 0.1 * width, right + 0.1 * width),
        "ylim": (low - 0.15 * height, high + 0.15 * height),
    }


def _draw_method(axes: Axes, points: Sequence[Point], colour: str, marker: str) -> None:
    x, y = (100 * np.array([getattr(point, name) for point in points]) for name in ("retention", "target"))
    axes.plot(x, y, marker, color=colour, markersize=4, alpha=0.4, markeredgewidth=0)
    if chosen := [(100 * point.retention, 100 * point.target) for point in points if point.is_chosen]:
        axes.plot(*zip(*chosen), "o", **_RING)
    if len({(point.seed, point.rate) for point in points}) == 1:
        order = np.argsort([point.alpha for point in points])
        axes.plot(x[order], y[order], color=colour, linewidth=1.8, marker=marker, label=points[0].method)
        return
    seeds = dict.fromkeys(point.seed for point in points)
    curves = [frontier([point for point in points if point.seed == seed]) for seed in seeds]
    low, high = max(curve[0].min() for curve in curves), min(curve[0].max() for curve in curves)
    if len(curves) == 1 or not low < high:
        low, high = min(curve[0].min() for curve in curves), max(curve[0].max() for curve in curves)
    grid = np.linspace(low, high, 200)
    targets = np.stack([np.interp(grid, *curve) for curve in curves])
    axes.plot(100 * grid, 100 * targets.mean(axis=0), color=colour, linewidth=1.8, label=points[0].method)
    if len(curves) > 1:
        _, low, high = np.array([bootstrap(column) for column in 100 * targets.T]).T
        axes.fill_between(100 * grid, low, high, color=colour, alpha=0.12)
