from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from flow_lightning.report.frontier import Point
from flow_lightning.report.frontier_picture import plot_frontier

PATH = [(0.0, 0.5, 1.0), (0.5, 0.8, 0.9), (1.0, 0.75, 0.6)]


def path_of(method: str, shift: float) -> list[Point]:
    return [Point(method, 1, 0.1, a, t - shift, r, (t, r), is_chosen=a == 0.5) for a, t, r in PATH]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def lines_of(axes: Any, name: str) -> list[list[list[float]]]:
    return [line.get_xydata().round(6).tolist() for line in axes.lines if line.get_label() == name]


def test_each_panel_has_the_whole_path_of_each_fit_on_the_same_axes(tmp_path: Path, figures: list[Figure]) -> None:
    panels = {
        "Clean": path_of("standard", 0) + path_of("flow", 0.01),
        "Wrong": path_of("standard", 0.2) + path_of("flow", 0.1),
    }
    plot_frontier(panels, tmp_path / "x.png", [0.8, 0.8])
    clean, wrong = figures[0].axes
    assert (clean.get_title(), wrong.get_title()) == ("Clean", "Wrong")
    assert clean.get_xlim() == wrong.get_xlim() and clean.get_ylim() == wrong.get_ylim()
    # Also where the fine-tuned model is worse in both than a point before it.
    assert lines_of(clean, "standard") == [[[100, 50], [90, 80], [60, 75]]]
    assert lines_of(wrong, "flow") == [[[100, 40], [90, 70], [60, 65]]]
    rings = [line for line in clean.lines if line.get_markersize() == 14 and len(line.get_xdata())]
    np.testing.assert_allclose([line.get_xydata()[0] for line in rings], [[90, 80], [90, 79]])
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(texts) == ["budget of 80 %", "chosen within the budget", "flow", "standard"]


def test_several_fits_of_a_method_have_one_frontier(tmp_path: Path, figures: list[Figure]) -> None:
    other = [Point("flow", 2, 0.1, p.alpha, p.target, p.retention, p.chosen_by) for p in path_of("flow", 0)]
    plot_frontier({"": path_of("flow", 0) + other}, tmp_path / "x.png", [0.98])
    (axes,) = figures[0].axes
    ((*_,),) = lines_of(axes, "flow")
    (line,) = (line for line in axes.lines if line.get_label() == "flow")
    assert line.get_xdata().min() == pytest.approx(90), "the end of the path is worse in both: not on the frontier"
