"""The charts of a page, as SVG with hovers: real text of 12 px, the page's own colour of text, no script.

In: numbers. Out: markup that a template takes as it is. Next: `section.py`.
Colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from flow_lightning.measures import Panel
from flow_lightning.report.pictures import BLUE, COLOURS, GREY, MARKERS, RED

#: Size of a chart in CSS pixels: the width of a phone, less its margins. SVG is drawn at 72 units an inch, one a pixel.
_WIDTH, _HEIGHT = 344, 250
#: Stands for the page's own colour of text.
_TEXT = "#010203"
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    **{"font.size": 12, "axes.labelsize": 12, "xtick.labelsize": 12, "ytick.labelsize": 12, "legend.fontsize": 12},
    **{"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False},
}
#: Most classes in a chart, letters of a name in it, and marks that the Tab key stops at.
MOST_CLASSES, _LETTERS, _STOPS = 16, 16, 40
#: C1 controls, marks that change the direction of writing, halves of a surrogate pair, and non-characters.
_UNSEEN = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_LOWER = " (lower is better)"
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}

Array = NDArray[np.float64]


class Chart:
    """Axes, the text of each mark's hover, and in the end the `markup`."""

    def __init__(self, caption: str, axes: Axes) -> None:
        self.caption, self.axes, self.hovers, self.markup = caption, axes, dict[str, str](), Markup()

    def hover(self, artist: Artist, text: str) -> None:
        """Show a text over a mark."""
        name = f"mark{len(self.hovers)}"
        artist.set_gid(name)
        self.hovers[name] = text

    def name_rows(self, names: Sequence[str]) -> None:
        """Name the rows of a chart, the first on top."""
        self.axes.set_yticks(range(len(names)), [short(name) for name in names])
        self.axes.set_ylim(len(names) - 0.5, -0.5)

    def legend(self) -> None:
        """Show the legend above the axes, in as many columns as fit."""
        longest = max(map(len, self.axes.get_legend_handles_labels()[1]))
        columns = max(1, min(3, _WIDTH // (44 + 7 * longest)))
        self.axes.figure.legend(loc="outside upper center", ncols=columns, columnspacing=1)


def visible(text: Any) -> str:
    """Replace what HTML or SVG may not hold, and what turns the direction of the text around it.

    >>> visible("a" + chr(0) + "b")
    'a␀b'
    """
    return _UNSEEN.sub("\ufffd", str(text).translate(_CONTROLS))


def short(name: str, letters: int = _LETTERS) -> str:
    """Cut a name that is too long for a chart."""
    line = " ".join(visible(name).split())
    return line if len(line) <= letters else line[: letters - 1] + "…"


@contextmanager
def chart(caption: str, height: float = _HEIGHT) -> Iterator[Chart]:
    """Yield a chart to draw in; afterwards it has its markup, with the caption for those who do not see it."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine())
        drawn = Chart(caption, figure.subplots())
        yield drawn
        content = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with rc_context({"svg.hashsalt": caption}), warnings.catch_warnings():  # names of clip paths: one in a page
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has its own fonts
            figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    drawn.markup = _markup(content.getvalue(), drawn)


def _markup(svg: bytes, drawn: Chart) -> Markup:
    """Make SVG part of a page: label, hovers, and none of what is for a file of its own."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(svg)
    root.attrib.update({name: root.get(name, "").removesuffix("pt") for name in ("width", "height")})
    root.attrib.update({"role": "group", "aria-label": visible(drawn.caption)})
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata")]:
            parent.remove(child)
    for group in root.iter(f"{{{_SVG}}}g"):
        if text := visible(drawn.hovers.get(group.attrib.pop("id", ""), "")):
            group.attrib.update({"class": "mark", "role": "img", "aria-label": text})
            if len(drawn.hovers) <= _STOPS:
                group.set("tabindex", "0")
    return Markup(ElementTree.tostring(root, encoding="unicode").replace(_TEXT, "currentColor"))


def losses(values: Array, temperature: float, unit: str) -> Chart:
    """Draw how many samples, or tokens, have which loss, and the temperature."""
    limit = max(min(6 * temperature, float(values.max())), 1e-6)
    counts, edges = np.histogram(values, bins=30, range=(0, limit))
    beyond = int((values > limit).sum())
    with chart("Losses of the pre-trained model; dashed: τ") as drawn:
        bars = drawn.axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE)
        for bar, count, low, high in zip(bars, counts, edges, edges[1:]):
            drawn.hover(bar, f"loss {low:.3g} to {high:.3g}: {count:,} {unit}")
        drawn.axes.axvline(temperature, color=_TEXT, linestyle="--", linewidth=1)
        drawn.axes.set(xlabel=f"loss ({beyond:,} lie further right)" if beyond else "loss", ylabel=unit)
    return drawn


def weights(values: Array, effective: float, unit: str) -> Chart:
    """Draw the weights from the highest to the lowest, and the effective share, a fraction."""
    share = np.linspace(0, 1, 201)
    ordered = np.quantile(values, 1 - share)
    with chart(f"Weights; dashed: the effective share of the {unit}") as drawn:
        drawn.axes.fill_between(100 * share, ordered, color=BLUE, alpha=0.35, linewidth=0)
        drawn.axes.plot(100 * share, ordered, color=BLUE, linewidth=2)
        drawn.axes.axvline(100 * effective, color=_TEXT, linestyle="--", linewidth=1)
        drawn.axes.set(xlim=(0, 100), ylim=(0, 1.05), xlabel=f"{unit}, from easy to hard (%)", ylabel="weight")
        for at in range(10, 191, 20):
            (dot,) = drawn.axes.plot(100 * share[at], ordered[at], "o", color=BLUE, markersize=4)
            drawn.hover(dot, f"{100 * share[at]:.0f} % of the {unit} have a weight of {ordered[at]:.3g} or more")
    return drawn


def losses_by_class(
    caption: str, values: Array, members: NDArray[np.int64], classes: Sequence[int], names: Sequence[str]
) -> Chart:
    """Draw for each class how its losses are distributed, as a row of shades, on a logarithmic scale."""
    logs = np.log10(np.maximum(values, 1e-6))
    low, high = np.quantile(logs, [0.005, 0.995])
    edges = np.linspace(low, max(high, low + 0.5), 21)
    logs = np.clip(logs, edges[0], edges[-1])
    shares = np.stack([np.histogram(logs[members == each], edges)[0] for each in classes]).astype(float)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    with chart(caption, 70 + 22 * len(classes)) as drawn:
        for row, (name, line) in enumerate(zip(names, shares)):
            for value, left, right in zip(line, edges, edges[1:]):
                alpha = max(0.08, value / shares.max()) if value else 0
                (box,) = drawn.axes.barh(row, right - left, 0.92, left, color=BLUE, alpha=alpha)
                drawn.hover(box, f"{name}: {value:.1%} have a loss from {10**left:.2g} to {10**right:.2g}")
        ticks = np.unique(np.round(np.linspace(edges[0], edges[-1], 4), 1))
        drawn.axes.set_xticks(ticks, [f"{10**each:.2g}" for each in ticks])
        drawn.axes.set_xlabel("loss (logarithmic)")
        drawn.name_rows(names)
    return drawn


def shares_of_weight(caption: str, ratios: Sequence[float], names: Sequence[str], starved: float) -> Chart:
    """Draw for each class its share of the weight, divided by its share of the samples; `starved` ones in red."""
    with chart(caption, 70 + 22 * len(names)) as drawn:
        bars = drawn.axes.barh(
            range(len(names)), ratios, 0.7, color=[RED if each < starved else BLUE for each in ratios]
        )
        for bar, name, ratio in zip(bars, names, ratios):
            drawn.hover(bar, f"{name}: {ratio:.2f} times its share of the samples")
        drawn.axes.axvline(1, color=_TEXT, linestyle="--", linewidth=1)
        drawn.axes.set_xlabel("share of weight / share of samples")
        drawn.name_rows(names)
    return drawn


def accuracies(caption: str, rows: Sequence[tuple[str, float, float, int]]) -> Chart:
    """Draw the accuracy of each class before and after training, in percent: name, before, after, samples."""
    names, before, after, _ = zip(*rows)
    with chart(caption, 90 + 22 * len(names)) as drawn:
        drawn.axes.hlines(range(len(names)), before, after, color=GREY, linewidth=2)
        drawn.axes.plot(before, range(len(names)), "o", color=RED, markersize=8, label="before")
        drawn.axes.plot([], [], "D", color=BLUE, markersize=7, label="after")
        for row, (name, first, last, count) in enumerate(rows):
            (mark,) = drawn.axes.plot(last, row, "D", color=BLUE, markersize=7)
            drawn.hover(mark, f"{name}: {first:.1f} % before, {last:.1f} % after, of {count:,} samples")
        drawn.axes.set_xlabel("accuracy (%)")
        drawn.name_rows(names)
        drawn.legend()
    return drawn


def lines(caption: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Draw curves `(x, y)` by their label, with a hover on up to 20 points of each."""
    with chart(caption, _HEIGHT + 20 * (len(curves) > 1)) as drawn:
        for order, (label, points) in enumerate(curves.items()):
            colour, marker = COLOURS[(order + 1) % 6], MARKERS[order % len(MARKERS)]
            drawn.axes.plot(*zip(*points), color=colour, linewidth=1.5, label=label)
            for x, y in points[:: -(-len(points) // 20)]:
                (mark,) = drawn.axes.plot(x, y, marker, color=colour, markersize=5)
                drawn.hover(mark, f"{label}, {x_label} {x:g}: {y:.4g}")
        drawn.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        drawn.axes.set(xlabel=x_label, ylabel=y_label)
        if len(curves) > 1:
            drawn.legend()
    return drawn


def axis_label(what: str, panel: Panel) -> str:
    """Name the main result of a measure, and say if lower is better."""
    return f"{what}: {panel.title}{' (%)' * panel.is_percent}{_LOWER * (panel.better == 'down')}"


def plane(
    caption: str,
    groups: Mapping[str, Sequence[tuple[float, float, str]]],
    x_label: str,
    y_label: str,
    line: bool = False,
) -> Chart:
    """Draw models by method, `(x, y, hover)`; perhaps joined by a line. Up and right is better."""
    with chart(caption, 272 + 18 * len(groups)) as drawn:
        for order, (name, points) in enumerate(groups.items()):
            colour, marker = COLOURS[(order + 1) % 6], MARKERS[order % len(MARKERS)]
            drawn.axes.plot([], [], marker, color=colour, label=short(name, 2 * _LETTERS))
            if line:
                drawn.axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, linewidth=1.5)
            for x, y, text in points:
                (mark,) = drawn.axes.plot(x, y, marker, color=colour, markersize=7, alpha=0.85)
                drawn.hover(mark, text)
        drawn.axes.set(xlabel=x_label, ylabel=y_label)
        drawn.axes.margins(0.1)
        for axis, label in ((drawn.axes.xaxis, x_label), (drawn.axes.yaxis, y_label)):
            axis.set_inverted(_LOWER in label)
        if len(groups) > 1:
            drawn.legend()
    return drawn
