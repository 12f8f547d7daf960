import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image, rcParams
from rich.console import Console

from flow_lightning.report.metrics import (
    METRICS,
    metrics_markdown,
    metrics_table,
    plot_comparison,
    plot_retention,
    plot_weights,
    read_metrics,
    write_metrics,
)

RUN = {
    "target/before/top1": 0.6,
    "target/top1": 0.8,
    "target/hard_top1": 0.3,
    "retention/before/top1": 0.5,
    "retention/after/top1": 0.4,
    "retention/after/top1_original_bn": 0.42,
    "average": 0.6,
}
UNLABELLED = {
    "target/top1": 0.8,
    "retention/after/agreement": 0.7,
    "retention/after/agreement_original_bn": 0.7,
    "retention/after/kl": 0.2,
    "average": 0.75,
}


def _printed(table):
    console = Console(width=200, record=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _is_picture(path):
    pixels = image.imread(path)
    return pixels.ndim == 3 and min(pixels.shape[:2]) > 200 and np.ptp(pixels) > 0.5


def test_metrics_are_merged_and_sorted(tmp_path):
    path = tmp_path / "run" / "metrics.json"
    write_metrics(path, {"b": 1.5, "a": 1})
    write_metrics(path, {"c": [{"epoch": 1}], "a": 2})
    assert read_metrics(path) == {"a": 2, "b": 1.5, "c": [{"epoch": 1}]}
    assert list(json.loads(path.read_text())) == ["a", "b", "c"]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"a": math.nan, "b": [{"c": math.inf}]})
    assert "NaN" not in path.read_text()
    assert read_metrics(path) == {"a": None, "b": [{"c": None}]}


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_file_of_another_kind_is_not_overwritten(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        write_metrics(path, {"a": 1})
    assert path.read_text() == content


def test_table_shows_mean_and_standard_deviation():
    accuracies = [0.79, 0.80, 0.84]
    text = _printed(metrics_table({"plain": [RUN | {"target/top1": a} for a in accuracies], "flow": UNLABELLED}))
    mean, spread = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    assert f"{mean:.1f} ± {spread:.1f} %" in text
    assert "80.0 %" in text and "plain" in text and "flow" in text
    assert "–" in text  # accuracy on the pre-trained task is missing in one column


def test_table_leaves_out_what_no_run_has_and_numbers_that_were_not_finite():
    text = _printed(metrics_table({"value": {"target/top1": 0.5, "retention/after/kl": None}}))
    assert "target accuracy" in text and "KL" not in text


def test_every_key_is_documented_once():
    keys = [metric.key for metric in METRICS]
    assert len(keys) == len(set(keys))
    assert {"target/top1", "target/hard_top1", "average", "flow/temperature", "flow/mean_weight"} <= set(keys)
    rows = metrics_markdown().splitlines()
    assert len(rows) == len(METRICS) + 2
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


@pytest.mark.parametrize("losses", [torch.rand(1000) ** 3, torch.full((5,), 2.0), torch.tensor([0.7])])
def test_weights_picture(tmp_path, losses):
    tau = losses.median().item()
    plot_weights(losses, torch.exp(-losses / tau), tau, tmp_path / "weights.png")
    assert _is_picture(tmp_path / "weights.png")


COURSE = [{"epoch": e, "step": 9 * e, "top1": 0.4, "top1_original_bn": None} for e in (1, 2)]


@pytest.mark.parametrize("metrics", [RUN, UNLABELLED, RUN | {"retention/epochs": COURSE}, {"target/top1": 0.5}, {}])
def test_retention_picture(tmp_path, metrics):
    plot_retention(metrics, tmp_path / "retention.png")
    assert (tmp_path / "retention.png").exists() if not metrics else _is_picture(tmp_path / "retention.png")


@pytest.mark.parametrize(
    "runs",
    [
        {"plain": [RUN], "flow": [RUN]},
        {"plain": [RUN, RUN | {"target/top1": 0.7}, RUN], "flow": [RUN]},
        {"plain": [UNLABELLED], "flow": [UNLABELLED, UNLABELLED]},
        {
            "plain": [{"target/top1": 0.5}],
            "diverged": [RUN | {"retention/after/top1": None, "average": None}],
        },
        {str(i): [RUN] for i in range(9)},
    ],
)
def test_comparison_picture(tmp_path, runs):
    before = dict(rcParams)
    plot_comparison(runs, tmp_path / "comparison.png")
    assert _is_picture(tmp_path / "comparison.png")
    assert dict(rcParams) == before


def test_the_readme_lists_every_metric():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert metrics_markdown() in readme
