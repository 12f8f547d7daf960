"""Room 6: the pictures of a run and of a comparison, as PNG. No pyplot: no window, no global state.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from flow_lightning.files import write_bytes
from flow_lightning.method.flow import effective_sample_size

GREY, ORANGE, BLUE, GREEN, RED = "#8a8a8a", "#E69F00", "#0072B2", "#009E73", "#D55E00"
COLOURS = (RED, BLUE, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

#: What is learned and what is kept, each under the first key that there is a value for, and its name in a picture.
_LEARNED = {
    "target/top1": "target accuracy",
    "target/exact_match": "right final answers",
    "target/loss": "target loss, nats",
}
_KEPT = {
    "retention/after/top1": "pre-trained task",
    "retention/after/agreement": "agreement",
    "retention/after/accuracy": "accuracy on general tasks",
    "retention/after/perplexity": "perplexity of general text",
}
#: Keys whose values are no fractions.
_LOWER_IS_BETTER = ("target/loss", "retention/after/perplexity")

#: Groups of bars in percent and their keys, of which a run has one.
_GROUPS = {
    "target": ("target/top1", "target/exact_match"),
    "target,\nhardest": ("target/hard_top1",),
    "pre-trained\ntask": ("retention/after/top1", "retention/after/agreement"),
    "general\ntasks": ("retention/after/accuracy",),
    "average": ("average",),
}

Bar = tuple[str, float, str]  # name, value, colour
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def plot_weights(scored: Any, path: str | Path) -> None:
    """Draw how the losses of the pre-trained model become weights.

    Left: the losses, the temperature, and the weight as a function of the loss. Right: all weights from the highest to
    the lowest, their mean, and the effective sample size. 10 million samples do: histograms and quantiles are drawn.

    Args:
        scored: `SampleWeights` or `TokenWeights`.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, weights = _some(scored)
    _draw_losses(left, losses.cpu().numpy(), scored.temperature)
    _draw_weights(right, weights.cpu())
    _save(figure, path)


def log_weights(loggers: Iterable[Any], scored: Any, picture: Path | None) -> None:
    """Give the distribution of losses and weights to loggers that draw histograms, the picture to those of images."""
    for logger in loggers:
        if hasattr(logger.experiment, "add_histogram"):
            losses, weights = _some(scored)
            logger.experiment.add_histogram("flow/weights", weights.cpu(), 0)
            logger.experiment.add_histogram("flow/losses", losses.clamp_min(1e-8).log10(), 0)
        elif hasattr(logger, "log_image") and picture is not None:
            logger.log_image("flow/weights", [str(picture)])


def _some(scored: Any, most: int = 1_000_000) -> tuple[Tensor, Tensor]:
    """Return losses and weights for a picture, evenly spaced ones if there are very many."""
    step = -(-scored.losses.numel() // most)
    return scored.losses[::step].detach().float(), scored.weights[::step].detach().float()


def _draw_losses(axes: Axes, losses: npt.NDArray[np.float32], temperature: float) -> None:
    # Beyond six temperatures a weight is below 0.0025: nothing is left to see.
    limit = max(min(float(np.quantile(losses, 0.995)), 6 * temperature), 1.5 * temperature)
    beyond = float((losses > limit).mean())
    axes.hist(losses, bins=60, range=(0.0, limit), color="#56B4E9", alpha=0.75)
    axes.axvline(temperature, color="black", linestyle="--", linewidth=1)
    label = f" τ = {temperature:.3g}"
    axes.text(temperature, 0.97, label, transform=axes.get_xaxis_transform(), va="top")
    axes.set(xlim=(0, limit), ylabel="samples", title="Losses of the pre-trained model")
    axes.set_xlabel("loss" + (f"   ({beyond:.1%} of the samples lie further right)" if beyond else ""))
    grid = np.linspace(0.0, limit, 200)
    curve = axes.twinx()
    curve.plot(grid, np.exp(-grid / temperature), color=RED, linewidth=2)
    curve.set_ylim(0, 1.05)
    curve.set_ylabel("weight  exp(−loss / τ)", color=RED)
    curve.tick_params(axis="y", labelcolor=RED)
    _tidy(axes)
    curve.spines["top"].set_visible(False)


def _draw_weights(axes: Axes, weights: Tensor) -> None:
    share = np.linspace(0.0, 1.0, 501)
    ordered = np.quantile(weights.numpy(), 1 - share)
    mean, size = weights.double().mean().item(), effective_sample_size(weights)
    axes.fill_between(100 * share, ordered, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(100 * share, ordered, color=BLUE, linewidth=2)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.text(99, mean + 0.015, f"mean {mean:.3f}", ha="right")
    axes.set(xlim=(0, 100), ylim=(0, 1.05), xlabel="samples, from easy to hard (%)", ylabel="weight")
    axes.set_title("Weights")
    label = f"effective sample size\n{size:,.0f} of {len(weights):,} ({size / len(weights):.0%})"
    axes.text(0.98, 0.97, label, transform=axes.transAxes, ha="right", va="top")
    _tidy(axes)


def plot_retention(metrics: Mapping[str, Any], path: str | Path) -> None:
    """Draw one run before and after training: what it learned and what it kept.

    Copes with a run that has only one of the two parts, with agreement in the place of accuracy, and with a language
    model, whose losses and perplexities have panels of their own. Where the pre-trained task was measured after
    epochs, a further panel shows the course.

    Args:
        metrics: The content of `metrics.json`.
        path: The PNG file to write.
    """
    panels = [panel for panel in (_learned_bars(metrics), *_language_bars(metrics), _kept_bars(metrics)) if panel[1]]
    course = metrics.get("retention/epochs") or []
    count = len(panels) + bool(course) or 1
    figure = Figure(figsize=(0.8 + 3.4 * count, 3.7), dpi=150, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for panel, (title, bars, unit) in zip(axes, panels):
        _draw_bars(panel, title, bars, unit)
    if course:
        _draw_course(axes[-1], course, _pretrained_level(metrics, retention_key(metrics)))
    _save(figure, path)


def _learned_bars(metrics: Mapping[str, Any]) -> tuple[str, list[Bar], str]:
    bars = _present(
        ("before", metrics.get("target/before/top1"), GREY),
        ("after", metrics.get("target/top1"), BLUE),
        ("after,\nhardest", metrics.get("target/hard_top1"), "#56B4E9"),
    )
    return "Learned: target accuracy", bars, "%"


def _language_bars(metrics: Mapping[str, Any]) -> list[tuple[str, list[Bar], str]]:
    """Return the panels of a language model: title, bars, and the unit."""
    panels = (
        ("Learned: right final answers", "target/before/exact_match", "target/exact_match", "%"),
        ("Learned: target loss", "target/before/loss", "target/loss", "nats per token (lower is better)"),
        ("Kept: accuracy on general tasks", "retention/before/accuracy", "retention/after/accuracy", "%"),
        (
            "Kept: general text",
            "retention/before/perplexity",
            "retention/after/perplexity",
            "perplexity (lower is better)",
        ),
    )
    return [
        (title, _present(("before", metrics.get(before), GREY), ("after", metrics.get(after), colour)), unit)
        for (title, before, after, unit), colour in zip(panels, (BLUE, BLUE, GREEN, GREEN))
    ]


def _present(*bars: tuple[str, Any, str]) -> list[Bar]:
    return [bar for bar in bars if bar[1] is not None]


def _kept_bars(metrics: Mapping[str, Any]) -> tuple[str, list[Bar], str]:
    key = retention_key(metrics)
    if key not in ("retention/after/top1", "retention/after/agreement"):
        return "", [], "%"
    bars = _present(
        ("before", _pretrained_level(metrics, key), GREY),
        ("after,\nBatchNorm\nas trained", metrics.get(key), GREEN),
        ("after,\noriginal\nBatchNorm", metrics.get(f"{key}_original_bn"), ORANGE),
    )
    return "Kept: " + retention_name(key), bars, "%"


def _draw_bars(axes: Axes, title: str, bars: Sequence[Bar], unit: str) -> None:
    names, values, colours = zip(*bars)
    percent = unit == "%"
    drawn = axes.bar(names, [100 * value if percent else value for value in values], color=colours, width=0.65)
    axes.bar_label(drawn, fmt="%.1f" if percent else "%.4g", padding=2)
    axes.set(ylim=(0, 108 if percent else 1.12 * max(values)), ylabel=unit, title=title)
    _tidy(axes)


def _draw_course(axes: Axes, course: Sequence[Mapping[str, Any]], level: float | None) -> None:
    if level is not None:
        axes.axhline(100 * level, color=GREY, linestyle="--", linewidth=1, label="before")
    key = "top1" if "top1" in course[0] else "agreement"
    epochs = [entry["epoch"] for entry in course]
    for name, colour, label in ((key, GREEN, "as trained"), (f"{key}_original_bn", ORANGE, "original")):
        values = [np.nan if entry.get(name) is None else 100 * entry[name] for entry in course]
        axes.plot(epochs, values, color=colour, marker="o", label=f"BatchNorm {label}")
    axes.set(ylim=(0, 108), xticks=epochs[:: max(1, len(epochs) // 6)], xlabel="epoch", title="Kept, by epoch")
    axes.legend(frameon=False, loc="lower left")
    _tidy(axes)


def plot_comparison(runs: Runs, path: str | Path) -> None:
    """Draw methods against each other: runs in the plane of learned and kept, and means as bars.

    A small marker is a run; where a method has several, the large one is their mean with the standard
    deviation (n - 1) as whiskers. Runs without a measurement of the pre-trained task give bars only. Losses and
    perplexities are no percentages and have bars of their own.

    Args:
        runs: Method name to the metrics of its runs.
        path: The PNG file to write.
    """
    every = [run for column in runs.values() for run in column]
    learned, kept = _first_key(_LEARNED, every), _first_key(_KEPT, every)
    plane = any(_points(column, learned, kept) for column in runs.values())
    numbers = [key for key in _LOWER_IS_BETTER if _first_key([key], every)]
    percent = any(_group_value(name, run) is not None for name in _GROUPS for run in every) or not numbers
    ratios = [1.0] * plane + [1.25] * percent + [0.5] * len(numbers)
    figure = Figure(figsize=(0.8 + 4.1 * sum(ratios) if plane else 5.6, 4.2), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0])
    figure.legend(handles=_legend(runs), loc="outside lower center", ncols=min(len(runs), 5), frameon=False)
    if plane and learned and kept:
        _draw_plane(axes.pop(0), runs, learned, kept)
    if percent:
        _draw_groups(axes.pop(0), runs)
    for panel, key in zip(axes, numbers):
        _draw_numbers(panel, runs, key)
    _save(figure, path)


def _legend(runs: Runs) -> list[Patch]:
    return [Patch(color=COLOURS[order % len(COLOURS)], label=name) for order, name in enumerate(runs)]


def _draw_plane(axes: Axes, runs: Runs, learned: str, kept: str) -> None:
    for order, column in enumerate(runs.values()):
        colour, marker = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
        points = _points(column, learned, kept)
        if len(points) > 1:
            axes.plot(*zip(*points), marker, color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
        if points:
            (x, dx), (y, dy) = (_mean_and_spread(values) for values in zip(*points))
            axes.errorbar(x, y, dy, dx, fmt=marker, color=colour, markersize=9, capsize=3, markeredgecolor="white")
    every = [run for column in runs.values() for run in column]
    levels = [level for run in every if (level := _pretrained_level(run, kept)) is not None]
    if levels:
        _draw_level(axes, _scale(kept) * statistics.fmean(levels))
    axes.margins(0.15)
    axes.set_xlabel(f"learned: {_label(_LEARNED, learned)}")
    axes.set_ylabel(f"kept: {_label(_KEPT, kept)}")
    if learned in _LOWER_IS_BETTER:
        axes.invert_xaxis()
    if kept in _LOWER_IS_BETTER:
        axes.invert_yaxis()
    else:
        axes.set_ylim(top=min(axes.get_ylim()[1], 103))
    axes.set_title("Each run: up and right is better")
    axes.grid(alpha=0.25)
    _tidy(axes)


def _draw_level(axes: Axes, level: float) -> None:
    axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        "pre-trained", (0.01, level), (0, -3), axes.get_yaxis_transform(), "offset points", va="top", color=GREY
    )


def _draw_groups(axes: Axes, runs: Runs) -> None:
    every = [run for column in runs.values() for run in column]
    shown = [name for name in _GROUPS if any(_group_value(name, run) is not None for run in every)]
    for order, column in enumerate(runs.values()):
        values = [[v for run in column if (v := _group_value(name, run)) is not None] for name in shown]
        _draw_means(axes, values, order, len(runs), "{:.1f}")
    axes.set_xticks(range(len(shown)), shown)
    several = any(len(column) > 1 for column in runs.values())
    title = "Mean ± standard deviation of the runs" if several else "One run per method"
    axes.set(ylim=(0, 110), ylabel="%", title=title)
    _tidy(axes)


def _draw_numbers(axes: Axes, runs: Runs, key: str) -> None:
    """Draw the bars of a value that is no percentage."""
    for order, column in enumerate(runs.values()):
        values = [float(run[key]) for run in column if run.get(key) is not None]
        _draw_means(axes, [values], order, len(runs), "{:.3g}")
    axes.set_xticks([])
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_ylabel((_LEARNED | _KEPT)[key] + " (lower is better)")
    _tidy(axes)


def _draw_means(axes: Axes, groups: Sequence[Sequence[float]], order: int, methods: int, pattern: str) -> None:
    """Draw the bars of one method, the `order`-th of them, with the mean of each group's runs."""
    width = 0.82 / max(1, methods)
    means, spreads = zip(*map(_mean_and_spread, groups)) if groups else ((), ())
    places = [group + (order - (methods - 1) / 2) * width for group in range(len(groups))]
    axes.bar(places, means, width * 0.94, color=COLOURS[order % len(COLOURS)])
    whiskers = [spread or np.nan for spread in spreads]
    axes.errorbar(places, means, whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for place, mean, spread in zip(places, means, spreads):
        top, label = (0, "–") if np.isnan(mean) else (mean + spread, pattern.format(mean))
        size = 8 if methods < 4 else 6
        axes.annotate(label, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=size)


def _group_value(group: str, metrics: Mapping[str, Any]) -> float | None:
    """Return what a group of bars shows of a run, in percent."""
    key = _first_key(_GROUPS[group], [metrics])
    return None if key is None else 100 * float(metrics[key])


def _first_key(keys: Iterable[str], runs: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first key under which some run has a value."""
    return next((key for key in keys if any(run.get(key) is not None for run in runs)), None)


def _scale(key: str) -> int:
    return 1 if key in _LOWER_IS_BETTER else 100


def _label(names: Mapping[str, str], key: str) -> str:
    return names[key] + ("\n(axis reversed: lower is better)" if key in _LOWER_IS_BETTER else " (%)")


def retention_key(metrics: Mapping[str, Any]) -> str | None:
    """Return the key of what is left of the pre-trained model, or None.

    Images: accuracy, else agreement. Language: accuracy on tasks, else perplexity, of which lower is better.
    """
    return _first_key(_KEPT, [metrics])


def retention_name(key: str) -> str:
    """Return what a picture calls the value under `key`."""
    return _KEPT[key]


def _pretrained_level(metrics: Mapping[str, Any], key: str | None) -> float | None:
    """Return what was kept, under `key`, before training: a model agrees with itself on everything."""
    if key == "retention/after/agreement":
        return 1.0
    level = metrics.get((key or "retention/after/top1").replace("after", "before"))
    return None if level is None else float(level)


def _points(column: Sequence[Mapping[str, Any]], learned: str | None, kept: str | None) -> list[tuple[float, float]]:
    """Return what was learned and what was kept, fractions in percent, for the runs that have both."""
    if learned is None or kept is None:
        return []
    pairs = [(run.get(learned), run.get(kept)) for run in column]
    return [(_scale(learned) * x, _scale(kept) * y) for x, y in pairs if x is not None and y is not None]


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    """Write the PNG whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())
