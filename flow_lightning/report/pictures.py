"""The pictures of a run, as PNG. No pyplot: no window, no global state.

In: weights, or the content of `metrics.json`. Out: PNG files. Next: `frontier_picture.py`.
Colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from flow_lightning.files import write_bytes
from flow_lightning.measures import Panel
from flow_lightning.method.flow import effective_sample_size
from flow_lightning.report.metrics import DECLARED, Declared

GREY, ORANGE, BLUE, GREEN, RED, SKY = "#8a8a8a", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9"
COLOURS = (RED, BLUE, GREEN, ORANGE, "#CC79A7", SKY, "#000000")
MARKERS = "osD^vPX"
#: What the parts of the keys are called in a picture, and the colours of their bars.
_PARTS = {"target": ("Learned", BLUE, SKY), "retention": ("Kept", GREEN, ORANGE)}


@contextmanager
def picture(path: str | Path, widths: Sequence[float], height: float) -> Iterator[tuple[Figure, Iterator[Axes]]]:
    """Yield a figure and its axes, side by side, sizes in inches; then write the PNG, whole or not at all."""
    layout = ConstrainedLayoutEngine(wspace=0.05)
    figure = Figure(figsize=(max(5.6, 0.8 + sum(widths)), height), dpi=150, layout=layout)
    every = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    yield figure, iter(every)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())


def plot_weights(scored: Any, path: str | Path) -> None:
    """Draw how the losses of the pre-trained model become weights.

    Left: losses and weight by loss. Right: weights from the highest to the lowest, their mean, the effective sample
    size. `scored` is `SampleWeights` or `TokenWeights`.
    """
    losses, weights = some_values(scored)
    with picture(path, [4.1, 4.1], 3.6) as (_, axes):
        _draw_losses(next(axes), losses.cpu(), scored.temperature)
        _draw_weights(next(axes), weights.cpu())


def some_values(scored: Any) -> tuple[Tensor, Tensor]:
    """Return losses and weights for a picture, evenly spaced ones if there are more than a million."""
    step = -(-scored.losses.numel() // 1_000_000)
    return scored.losses[::step].detach().float(), scored.weights[::step].detach().float()


def _draw_losses(axes: Axes, losses: Tensor, temperature: float) -> None:
    # Beyond six temperatures a weight is below 0.0025: nothing is left to see.
    limit = max(min(float(np.quantile(losses.numpy(), 0.995)), 6 * temperature), 1.5 * temperature)
    beyond = (losses > limit).double().mean().item()
    axes.hist(losses.numpy(), bins=60, range=(0.0, limit), color=SKY, alpha=0.75)
    axes.axvline(temperature, color="black", linestyle="--", linewidth=1)
    axes.text(temperature, 0.97, f" τ = {temperature:.3g}", transform=axes.get_xaxis_transform(), va="top")
    label = "loss" + (f"   ({beyond:.1%} of the samples lie further right)" if beyond else "")
    axes.set(xlim=(0, limit), xlabel=label, ylabel="samples", title="Losses of the pre-trained model")
    grid = np.linspace(0.0, limit, 200)
    curve = axes.twinx()
    curve.plot(grid, np.exp(-grid / temperature), color=RED, linewidth=2)
    curve.set_ylim(0, 1.05)
    curve.set_ylabel("weight  exp(−loss / τ)", color=RED)
    curve.tick_params(axis="y", labelcolor=RED)
    curve.spines["top"].set_visible(False)


def _draw_weights(axes: Axes, weights: Tensor) -> None:
    share = np.linspace(0.0, 1.0, 501)
    ordered = np.quantile(weights.numpy(), 1 - share)
    mean, size = weights.double().mean().item(), effective_sample_size(weights)
    axes.fill_between(100 * share, ordered, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(100 * share, ordered, color=BLUE, linewidth=2)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.text(99, mean + 0.015, f"mean {mean:.3f}", ha="right")
    axes.set(xlim=(0, 100), ylim=(0, 1.05), xlabel="samples, from easy to hard (%)", ylabel="weight", title="Weights")
    label = f"effective sample size\n{size:,.0f} of {len(weights):,} ({size / len(weights):.0%})"
    axes.text(0.98, 0.97, label, transform=axes.transAxes, ha="right", va="top")


def plot_retention(metrics: Mapping[str, Any], path: str | Path, declared: Declared = DECLARED) -> None:
    """Draw a run, from its `metrics.json`: for each measure a panel before and after, and one of its epochs."""
    panels = [panel for panel in declared.panels if panel.part in _PARTS and _bars(panel, metrics)]
    course = metrics.get("retention/epochs") or []
    courses = [panel for panel in panels if _after_epochs(panel, course)]
    with picture(path, [3.5] * max(1, len(panels) + len(courses)), 3.7) as (_, axes):
        for panel in panels:
            _draw_bars(next(axes), panel, _bars(panel, metrics))
        for panel in courses:
            _draw_course(next(axes), panel, metrics.get(panel.before), course)


def _bars(panel: Panel, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return label and height of the bars of a run."""
    bars = {"before": panel.before, **panel.bars_after}
    return {label: _scaled(metrics[key], panel) for label, key in bars.items() if metrics.get(key) is not None}


def _draw_bars(axes: Axes, panel: Panel, bars: Mapping[str, float]) -> None:
    part, *colours = _PARTS[panel.part]
    fills = [GREY if label == "before" else colours.pop(0) for label in bars]
    drawn = axes.bar(list(bars), list(bars.values()), color=fills, width=0.65)
    axes.bar_label(drawn, fmt="%.1f" if panel.is_percent else "%.4g", padding=2)
    top = 108 if panel.is_percent else 1.12 * max(bars.values())
    axes.set(ylim=(0, top), ylabel=_label(panel), title=f"{part}: {panel.title}")


def _draw_course(axes: Axes, panel: Panel, before: float | None, course: Sequence[Mapping[str, Any]]) -> None:
    if before is not None:
        axes.axhline(_scaled(before, panel), color=GREY, linestyle="--", linewidth=1, label="before")
    epochs = [entry["epoch"] for entry in course]
    for (label, heights), colour in zip(_after_epochs(panel, course).items(), (GREEN, ORANGE)):
        axes.plot(epochs, heights, color=colour, marker="o", label=label.removeprefix("after,\n").replace("\n", " "))
    top = 108 if panel.is_percent else 1.12 * axes.get_ylim()[1]
    axes.set(xticks=epochs[:: -(-len(epochs) // 6)], xlabel="epoch", ylabel=_label(panel), title="Kept, by epoch")
    axes.set_ylim(0, top)
    axes.legend(frameon=False, loc="lower left")


def _after_epochs(panel: Panel, course: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the heights after epochs of each bar that has some; they have the last part of the bar's key."""
    names = {label: key.removeprefix("retention/after/") for label, key in panel.bars_after.items()}
    rows = {label: [_scaled(entry.get(name), panel) for entry in course] for label, name in names.items()}
    return {label: row for label, row in rows.items() if not np.isnan(row).all()}


def plot_path(points: Sequence[Mapping[str, float]], alpha: float, keep: float, of: str, path: str | Path) -> None:
    """Draw the path of a fit: what its points keep, with the bound and the budget, and what they have learned.

    Points have `alpha`, `kept`, `bound`, `target_loss` and, of validation samples, `target_top1`; without it the loss
    is that of training samples. `alpha` is that of the chosen one.
    """
    alphas, kept, bound = (np.array([point[name] for point in points]) for name in ("alpha", "kept", "bound"))
    learned = "target_top1" if "target_top1" in points[0] else "target_loss"
    scale, label = (
        (100, "validation accuracy (%)")
        if learned == "target_top1"
        else (1, "loss of training samples (lower is better)")
    )
    with picture(path, [4.1, 4.1], 3.6) as (_, axes):
        left, right = next(axes), next(axes)
        left.fill_between(
            alphas, 100 * bound, 100 * kept, color=GREEN, alpha=0.2, linewidth=0, label="down to the bound"
        )
        left.plot(alphas, 100 * kept, color=GREEN, marker="o", label="kept")
        left.axhline(100 * keep, color="black", linestyle="--", linewidth=1, label="budget")
        left.set(ylabel=f"{of} kept (%)", title="Kept")
        right.plot(alphas, [scale * point[learned] for point in points], color=BLUE, marker="o")
        right.set(ylabel=label, title="Learned")
        for place in (left, right):
            place.axvline(alpha, color=RED, linewidth=1, label="chosen")
            place.set(xlabel="alpha (0: pre-trained, 1: fine-tuned)")
        left.legend(frameon=False, loc="lower left")


def _scaled(value: float | None, panel: Panel) -> float:
    return np.nan if value is None else 100 * value if panel.is_percent else value


def _label(panel: Panel) -> str:
    if panel.is_percent:
        return f"{panel.title} (%)"
    unit = ", nats per token" if panel.unit == "nats" else ""
    return f"{panel.title}{unit}\n({'lower' if panel.better == 'down' else 'higher'} is better)"
