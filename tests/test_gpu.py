"""The suite for GPUs runs in its tiny mode on a CPU, so that it is ready when there is a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu.__main__ import PARTS, main, table, write, wrong
from tests.benchmarks.gpu.rows import row, skipped


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("correctness", ["gradient, bf16", "gradient, fp32, compiled", "gradient, fp32, joined"]),
        ("processes", ["parameters, 2 processes, gloo", "NCCL |  | not measured: it needs two GPUs"]),
        ("vision", ["scoring, fp32", "weighted step, bf16, channels_last", "recipe: solved head, of an epoch"]),
        ("language 135M", ["weighted step, peak memory", "weighted step, of that peak (MFU)"]),
        ("language 2B", ["weighted step, of that peak (MFU)"]),
        ("trainers", ["ours, weighted", "transformers"]),
        ("unsloth", ["unsloth |  | not measured: it cannot be imported, or there is no GPU"]),
    ],
)
def test_each_part_is_right_and_in_the_table(tmp_path, part, what):
    write(tmp_path, part, list(PARTS[part]("cpu", True)))
    assert wrong(tmp_path) == 0
    assert all(each in table(tmp_path) for each in what)


@pytest.mark.parametrize("geometry", ["1B", "2B"])
def test_a_large_model_is_left_out_without_a_gpu(geometry):
    (only,) = PARTS[f"language {geometry}"]("cpu", False)
    assert only == skipped("all of it", f"the {geometry} geometry is for a GPU")


def test_the_command_needs_neither_jsonargparse_nor_datasets_and_writes_a_part(tmp_path):
    hidden = "import runpy, sys; sys.modules.update(jsonargparse=None, datasets=None); "
    run = "runpy.run_module('tests.benchmarks.gpu', run_name='__main__', alter_sys=True)"
    options = [f"--out={tmp_path}", "--device=cpu", "--tiny", "--part=correctness"]
    subprocess.run([sys.executable, "-c", hidden + run, *options], check=True, cwd=Path(__file__).parents[1])
    assert "gradient, bf16" in table(tmp_path)


def test_a_part_that_takes_too_long_keeps_the_rows_that_it_has(tmp_path, monkeypatch):
    def killed(command, timeout, **_):
        if command[-1] == "vision":
            write(tmp_path, "vision", [row("scoring, fp32", 1.0, "images/s")])
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("tests.benchmarks.gpu.__main__.subprocess.run", killed)
    monkeypatch.setattr(sys, "argv", ["gpu", f"--out={tmp_path}", "--seconds=7"])
    assert main() == 1
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if "| vision |" in line]
    assert len(rows) == 2 and "| scoring, fp32 | 1 |" in rows[0] and "it took over 7 s" in rows[1]


def test_parts_for_which_no_time_is_left_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", f"--out={tmp_path}", "--total=0"])
    assert main() == len(PARTS)
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| all else |  | not measured: no time was left |") == len(PARTS)


def test_a_value_beyond_its_bound_or_not_a_number_is_counted_and_a_row_that_was_skipped_is_not(tmp_path):
    rows = [row("a", 0.5, "relative error", 1.0), row("b", 2.0, "x", 1.0), row("c", float("nan"), "x", 1.0)]
    write(tmp_path, "correctness", [*rows, skipped("d", "no time")])
    assert wrong(tmp_path) == 2
