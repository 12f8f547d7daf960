"""The suite for GPUs runs in its tiny mode on a CPU, so that it is ready when there is a GPU."""

import json

from tests.benchmarks.gpu import PARTS, row, table, wrong


def test_each_part_is_right_and_in_the_table(tmp_path):
    for name, part in PARTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part("cpu", True)))
    assert wrong(tmp_path) == 0
    text = table(tmp_path)
    for what in ("correctness | gradient of the head, fp32", "vision | scoring", "language | weighted step, peak"):
        assert f"| {what}" in text


def test_a_value_beyond_its_bound_or_not_a_number_is_counted(tmp_path):
    rows = [row("a", 0.5, "relative error", 1.0), row("b", 2.0, "x", 1.0), row("c", float("nan"), "x", 1.0)]
    (tmp_path / "correctness.json").write_text(json.dumps(rows))
    assert wrong(tmp_path) == 2
