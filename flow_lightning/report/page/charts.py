"""The charts of a page, as SVG with hovers: real text of 12 px, the page's own colour of text, no script.

In: numbers. Out: markup that a template takes as it is. Next: `run_page.py`.
Colours are those of Okabe and Ito; where two meet, their lightness differs, too.
"""

import io
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

from flow_lightning.report.pictures import BLUE, COLOURS, GREY, MARKERS, RED

#: Size of a chart in CSS pixels: the width of a phone, less its margins. SVG is drawn at 72 units an inch, one a pixel.
_WIDTH, _HEIGHT = 344, 250
#: Stands for the page's own colour of text.
_TEXT = "#010203"
_SVG = "http://www.w3.org/2000/svg"
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    **{"font.size": 12, "axes.labelsize": 12, "xtick.labelsize": 12, "ytick.labelsize": 12, "legend.fontsize": 12},
    **{"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "xtick.top": False, "legend.borderpad": 0.2},
}
#: Most classes in a chart, most letters of a name in it.
MOST_CLASSES = 16
_LETTERS = 16

Array = NDArray[np.float64]


class Chart:
    """Axes, the text of each mark's hover, and in the end the `markup`."""

    def __init__(self, axes: Axes) -> None:
        self.axes, self.hovers, self.markup = axes, dict[str, str](), Markup()

    def hover(self, artist: Artist, text: str) -> None:
        """Show a text over a mark."""
        name = f"mark{len(self.hovers)}"
        artist.set_gid(name)
        self.hovers[name] = text


def visible(text: Any) -> str:
    """Replace control characters, which neither HTML nor SVG may hold, by their pictures, and halves of a pair.

    >>> visible("a" + chr(0) + "b")
    'a␀b'
    """
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(text))
    shown = "".join("�" if 0x7F <= ord(c) < 0xA0 or 0xFFFE <= ord(c) <= 0xFFFF else c for c in shown)
    return shown.encode("utf-8", "replace").decode()


def short(name: str) -> str:
    """Cut a name that is too long for a chart."""
    line = " ".join(visible(name).split())
    return line if len(line) <= _LETTERS else line[: _LETTERS - 1] + "…"


@contextmanager
def chart(alt: str, height: float = _HEIGHT) -> Iterator[Chart]:
    """Yield a chart to draw in; afterwards it has its markup, with `alt` for those who do not see it."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine())
        drawn = Chart(figure.subplots())
        yield drawn
        content = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with rc_context({"svg.hashsalt": alt}), warnings.catch_warnings():  # names of clip paths: unique in a page
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has its own fonts
            figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    drawn.markup = _markup(content.getvalue(), alt, drawn.hovers)


def _markup(svg: bytes, alt: str, hovers: Mapping[str, str]) -> Markup:
    """Make SVG part of a page: label, hovers, and none of what is for a file of its own."""
    if not svg:
        return Markup()
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    root.attrib.update({"role": "group", "aria-label": visible(alt)})
    root.attrib.update(
        {"width": root.get("width", "").replace("pt", ""), "height": root.get("height", "").replace("pt", "")}
    )
    for parent in root.iter():
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}style" or child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for group in root.iter(f"{{{_SVG}}}g"):
        name = group.attrib.pop("id", "")
        if name in hovers:
            ElementTree.SubElement(group, f"{{{_SVG}}}title").text = visible(hovers[name])
            group.attrib.update({"class": "mark", "role": "img", "aria-label": visible(hovers[name])})
            if len(hovers) <= 80:
                group.set("tabindex", "0")
    return Markup(ElementTree.tostring(root, encoding="unicode").replace(_TEXT, "currentColor"))


def losses(values: Array, temperature: float | None) -> Chart:
    """Draw how many samples have which loss, and the temperature."""
    limit = float(np.quantile(values, 0.99)) if temperature is None else 6 * temperature
    limit = max(min(limit, float(values.max())), 1e-6)
    counts, edges = np.histogram(values, bins=30, range=(0, limit))
    beyond = int((values > limit).sum())
    with chart("Histogram of the losses of the pre-trained model") as drawn:
        bars = drawn.axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE)
        for bar, count, low, high in zip(bars, counts, edges, edges[1:]):
            drawn.hover(bar, f"loss {low:.3g} to {high:.3g}: {count:,} samples")
        if temperature is not None:
            drawn.axes.axvline(temperature, color=_TEXT, linestyle="--", linewidth=1)
            drawn.axes.annotate(
                f" τ = {temperature:.3g}", (temperature, 0.97), xycoords=("data", "axes fraction"), va="top"
            )
        drawn.axes.set(xlabel=f"loss ({beyond:,} lie further right)" if beyond else "loss", ylabel="samples")
    return drawn


def weights(values: Array, effective: float) -> Chart:
    """Draw the weights from the highest to the lowest, and the effective sample size as a share."""
    share = np.linspace(0, 1, 201)
    ordered = np.quantile(values, 1 - share)
    with chart("Weights of the samples, from the highest to the lowest") as drawn:
        drawn.axes.fill_between(100 * share, ordered, color=BLUE, alpha=0.35, linewidth=0)
        drawn.axes.plot(100 * share, ordered, color=BLUE, linewidth=2)
        drawn.axes.axvline(100 * effective / len(values), color=_TEXT, linestyle="--", linewidth=1)
        drawn.axes.set(xlim=(0, 100), ylim=(0, 1.05), xlabel="samples, from easy to hard (%)", ylabel="weight")
        for at in range(5, 100, 10):
            (dot,) = drawn.axes.plot([at], [np.quantile(values, 1 - at / 100)], "o", color=BLUE, markersize=4)
            drawn.hover(dot, f"{at} % of the samples have a weight of {np.quantile(values, 1 - at / 100):.3g} or more")
    return drawn


def losses_by_class(values: Array, labels: NDArray[np.int64], classes: Sequence[int], names: Sequence[str]) -> Chart:
    """Draw for each class how its losses are distributed, as a row of shades, on a logarithmic scale."""
    positive = np.maximum(values, 1e-6)
    low, high = np.log10(np.quantile(positive, [0.005, 0.995]))
    edges = np.linspace(low, max(high, low + 0.5), 25)
    logs = np.clip(np.log10(positive), edges[0], edges[-1])
    shares = np.stack([np.histogram(logs[labels == each], edges)[0] for each in classes]).astype(float)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    with chart("Losses by class: darker where more of a class lie", 70 + 22 * len(classes)) as drawn:
        for row, (name, line) in enumerate(zip(names, shares)):
            for value, left, right in zip(line, edges, edges[1:]):
                if value > 0:
                    (box,) = drawn.axes.barh(
                        row, right - left, 0.92, left, color=BLUE, alpha=max(0.08, value / shares.max())
                    )
                    drawn.hover(box, f"{name}: {value:.1%} have a loss from {10**left:.2g} to {10**right:.2g}")
        ticks = np.arange(np.ceil(edges[0]), np.floor(edges[-1]) + 1)
        drawn.axes.set_xticks(ticks, [f"{10**each:g}" for each in ticks])
        drawn.axes.set_yticks(range(len(names)), [short(name) for name in names])
        drawn.axes.invert_yaxis()
        drawn.axes.set_xlabel("loss (logarithmic)")
    return drawn


def shares_of_weight(ratios: Sequence[float], names: Sequence[str], starved: float) -> Chart:
    """Draw for each class its share of the weight, divided by its share of the samples; `starved` ones in red."""
    with chart("Share of the weight by class, relative to its share of the samples", 70 + 22 * len(names)) as drawn:
        bars = drawn.axes.barh(
            range(len(names)), ratios, 0.7, color=[RED if each < starved else BLUE for each in ratios]
        )
        for bar, name, ratio in zip(bars, names, ratios):
            drawn.hover(bar, f"{name}: {ratio:.2f} times its share of the samples")
        drawn.axes.axvline(1, color=_TEXT, linestyle="--", linewidth=1)
        drawn.axes.set_yticks(range(len(names)), [short(name) for name in names])
        drawn.axes.invert_yaxis()
        drawn.axes.set_xlabel("share of weight / share of samples")
    return drawn


def accuracies(before: Sequence[float], after: Sequence[float], names: Sequence[str], counts: Sequence[int]) -> Chart:
    """Draw the accuracy of each class before and after training, joined by a line."""
    with chart("Accuracy by class, before and after training", 90 + 22 * len(names)) as drawn:
        rows = range(len(names))
        drawn.axes.hlines(rows, before, after, color=GREY, linewidth=2)
        drawn.axes.plot(before, rows, "o", color=RED, markersize=8, label="before")
        drawn.axes.plot(after, rows, "D", color=BLUE, markersize=7, label="after")
        for row, name, first, last, count in zip(rows, names, before, after, counts):
            (mark,) = drawn.axes.plot([last], [row], "D", color=BLUE, markersize=7)
            drawn.hover(mark, f"{name}: {first:.1f} % before, {last:.1f} % after, of {count:,} samples")
        drawn.axes.set_yticks(rows, [short(name) for name in names])
        drawn.axes.invert_yaxis()
        drawn.axes.set_xlabel("accuracy (%)")
        drawn.axes.figure.legend(loc="outside upper center", ncols=2)  # type: ignore[union-attr]
    return drawn


def lines(alt: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Draw curves `(x, y)` by their label, with a hover on up to 40 points of each."""
    with chart(alt, _HEIGHT + 20 * (len(curves) > 1)) as drawn:
        for order, (label, points) in enumerate(curves.items()):
            colour, marker = COLOURS[(order + 1) % 6], MARKERS[order % len(MARKERS)]
            drawn.axes.plot(*zip(*points), color=colour, linewidth=1.5, label=label)
            for x, y in points[:: -(-len(points) // 20)]:
                (mark,) = drawn.axes.plot([x], [y], marker, color=colour, markersize=4)
                drawn.hover(mark, f"{label}, {x_label} {x:g}: {y:.4g}")
        drawn.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        drawn.axes.set(xlabel=x_label, ylabel=y_label)
        if len(curves) > 1:
            drawn.axes.figure.legend(loc="outside upper center", ncols=2)  # type: ignore[union-attr]
    return drawn


def plane(
    groups: Mapping[str, Sequence[tuple[float, float, str]]], x_label: str, y_label: str, line: bool = False
) -> Chart:
    """Draw runs, or points of a path, by method: `(x, y, hover)`; perhaps joined by a line."""
    with chart(f"{y_label} against {x_label}", 290) as drawn:
        for order, (name, points) in enumerate(groups.items()):
            colour, marker = COLOURS[(order + 1) % 6], MARKERS[order % len(MARKERS)]
            drawn.axes.plot([], [], marker, color=colour, label=short(name))
            if line:
                drawn.axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, linewidth=1.5)
            for x, y, text in points:
                (mark,) = drawn.axes.plot([x], [y], marker, color=colour, markersize=7, alpha=0.85)
                drawn.hover(mark, text)
        drawn.axes.set(xlabel=x_label, ylabel=y_label)
        drawn.axes.margins(0.1)
        drawn.axes.yaxis.set_inverted("lower is better" in y_label)
        if len(groups) > 1:
            drawn.axes.figure.legend(loc="outside upper center", ncols=3)  # type: ignore[union-attr]
    return drawn
