"""Charts: marks with words, the page's colour, and numbers that are those of numpy."""

from xml.etree import ElementTree

import numpy as np
import pytest

from flow_lightning.report.page import charts


def hovers(drawn):
    return list(drawn.hovers.values())


def test_the_histogram_counts_as_numpy_does():
    values = np.random.default_rng(0).exponential(1.0, 500)
    drawn = charts.losses(values, 0.7, "samples")
    counts, _ = np.histogram(values, bins=30, range=(0, min(4.2, values.max())))
    assert [int(text.split(": ")[1].split()[0]) for text in hovers(drawn)] == counts.tolist()


def test_shades_of_a_class_add_up_to_all_of_it():
    rng = np.random.default_rng(0)
    drawn = charts.losses_by_class("c", rng.exponential(1.0, 300), np.arange(300) % 2, [1, 0], ["one", "zero"])
    for name in ("one", "zero"):
        shares = [float(text.split(": ")[1].split("%")[0]) for text in hovers(drawn) if text.startswith(name)]
        assert sum(shares) == pytest.approx(100, abs=1.0)


def test_constant_losses_and_a_single_point_can_be_drawn():
    charts.losses_by_class("c", np.zeros(3), np.zeros(3, int), [0], ["a"])
    charts.losses(np.zeros(3), 1e-12, "samples")
    assert hovers(charts.lines("c", "step", "loss", {"loss": [(1.0, 2.0)]})) == ["loss, step 1: 2"]


@pytest.mark.usefixtures("rendered")
def test_markup_is_svg_with_focusable_marks_in_the_colour_of_the_page():
    markup = charts.shares_of_weight("a <b>", [0.2, 1.5], ["<i>", "x\x00"], 0.5).markup
    root = ElementTree.fromstring(markup)
    assert root.get("aria-label") == "a <b>" and root.get("width") == "344" and "currentColor" in markup
    marks = [each for each in root.iter() if each.get("class") == "mark"]
    assert [mark.get("aria-label") for mark in marks] == [
        "<i>: 0.20 times its share of the samples",
        "x␀: 1.50 times its share of the samples",
    ]
    assert all(mark.get("tabindex") == "0" for mark in marks) and "<style" not in markup


def test_long_names_are_cut_and_controls_are_visible():
    assert charts.short("a" * 30) == "a" * 15 + "…" and charts.short("a\nb") == "a b"
    assert charts.visible("\x85\ud800\u202e\x1b[1m") == "���␛[1m"


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize(
    "names", [["standard", "flow", "excess", "sfa"], ["standard adamw, 30 % wrong"] * 4, ["n" * 99] * 9]
)
def test_a_legend_fits_the_chart(names):
    drawn = charts.plane("c", {f"{i}{name}": [(1, 2, "x"), (2, 3, "y")] for i, name in enumerate(names)}, "x", "y")
    figure = drawn.axes.figure
    box, plane = figure.legends[0].get_tightbbox(), drawn.axes.get_position()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert plane.height > 0.45
