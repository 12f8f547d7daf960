"""Every picture is drawn, with whatever of the numbers there is, and nothing of matplotlib's settings changes."""

import numpy as np
import pytest
import torch
from matplotlib import image, rcParams
from matplotlib.figure import Figure
from matplotlib.text import Text

from flow_lightning.method.weights import SampleWeights
from flow_lightning.report.metrics import declared_by
from flow_lightning.report.pictures import (
    plot_path,
    plot_retention,
    plot_weights,
)
from tests.retention import RUN, UNLABELLED, SizeOfHead

COURSE = [{"epoch": e, "step": 9 * e, "top1": 0.4, "top1_original_bn": None} for e in (1, 2)]
LOSS_ONLY = {"target/before/loss": 1.2, "target/loss": 0.3, "retention/after/perplexity": 21.0}
TEXT = LOSS_ONLY | {
    "target/exact_match": 0.4,
    "retention/before/perplexity": 17.0,
    "retention/before/accuracy": 0.5,
    "retention/after/accuracy": 0.45,
    "average": 0.425,
}
TEXT_COURSE = [{"epoch": e, "step": e, "perplexity": 17.0 + e, "accuracy": 0.5 - 0.01 * e} for e in (1, 2, 3)]


@pytest.fixture(autouse=True)
def drawn(monkeypatch, rendered):
    """The figures that a test saves; each letter must be large enough to read."""
    figures, savefig = [], Figure.savefig

    def save(figure, *args, **kwargs):
        figures.append(figure)
        return savefig(figure, *args, **kwargs)

    before = dict(rcParams)
    monkeypatch.setattr(Figure, "savefig", save)
    yield figures
    assert dict(rcParams) == before
    for figure in figures:
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8


def is_picture(path):
    pixels = image.imread(path)
    return pixels.ndim == 3 and min(pixels.shape[:2]) > 200 and np.ptp(pixels) > 0.5


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def heights(axes):
    return [round(float(bar.get_height()), 3) for bar in axes.patches]


@pytest.mark.parametrize("losses", [torch.rand(1000) ** 3, torch.full((5,), 2.0), torch.tensor([0.7])])
def test_weights_picture(losses):
    plot_weights(SampleWeights.from_losses(losses), "weights.png")
    assert is_picture("weights.png")


@pytest.mark.parametrize("metrics", [UNLABELLED, {"target/top1": 0.5}, LOSS_ONLY, {}])
def test_retention_picture(metrics):
    plot_retention(metrics, "retention.png")
    assert is_picture("retention.png")


@pytest.mark.parametrize(
    ("learned", "label"),
    [("target_top1", "validation accuracy (%)"), (None, "loss of training samples (lower is better)")],
)
def test_path_picture(drawn, learned, label):
    points = [{"alpha": a, "kept": 1 - a / 5, "bound": 1 - a / 4, "target_loss": 1 - a / 2} for a in (0.0, 0.5, 1.0)]
    plot_path([point | ({learned: 0.6} if learned else {}) for point in points], 0.5, 0.98, "accuracy", "path.png")
    assert is_picture("path.png") and titles(drawn[0]) == ["Kept", "Learned"]
    assert drawn[0].axes[0].get_lines()[0].get_ydata().tolist() == [100, 90, 80]
    assert drawn[0].axes[1].get_ylabel() == label


def test_a_run_shows_what_was_measured_before_and_after(drawn):
    plot_retention(RUN | {"retention/epochs": COURSE}, "retention.png")
    assert is_picture("retention.png")
    assert titles(drawn[0]) == ["Learned: target accuracy", "Kept: pre-trained task", "Kept, by epoch"]
    assert heights(drawn[0].axes[0]) == [60, 80, 30] and heights(drawn[0].axes[1]) == [50, 40, 42]
    legend = [label.get_text() for label in drawn[0].axes[2].get_legend().get_texts()]
    assert legend == ["before", "BatchNorm as trained"]


def test_a_language_run_shows_the_course_of_each_thing_that_it_kept(drawn):
    plot_retention(TEXT | {"retention/epochs": TEXT_COURSE}, "retention.png")
    learned, kept = ["right final answers", "target loss"], ["accuracy on general tasks", "perplexity of general text"]
    expected = [f"Learned: {title}" for title in learned] + [f"Kept: {title}" for title in kept]
    assert titles(drawn[0]) == expected + ["Kept, by epoch"] * 2
    (_, line) = drawn[0].axes[5].lines
    assert line.get_ydata().tolist() == [18, 19, 20]


def test_a_measure_of_ones_own_is_drawn(drawn):
    run, declared = {"target/top1": 0.5, "retention/after/size": 3.0}, declared_by([SizeOfHead()])
    plot_retention(run, "retention.png", declared)
    assert titles(drawn[0])[1] == "Kept: size of the head" and heights(drawn[0].axes[1]) == [3]
    assert drawn[0].axes[1].get_ylabel() == "size of the head\n(lower is better)"
