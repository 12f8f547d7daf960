"""The suite for GPUs runs in its tiny mode on a CPU, so that it is ready when there is a GPU."""

import pytest

from tests.benchmarks.gpu.__main__ import PARTS, table, write, wrong
from tests.benchmarks.gpu.rows import row, skipped


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("correctness", ["gradient, bf16", "fp32, compiled |  | not measured: compiling takes longer"]),
        ("processes", ["parameters, 2 processes, gloo", "NCCL |  | not measured: it needs two GPUs"]),
        ("vision", ["scoring, fp32", "weighted step, bf16, channels_last"]),
        ("language 135M", ["weighted step, peak memory", "weighted step, of that peak (MFU)"]),
        ("language 2B", ["weighted step, of that peak (MFU)"]),
        ("trainers", ["ours, weighted", "transformers"]),
    ],
)
def test_each_part_is_right_and_in_the_table(tmp_path, part, what):
    write(tmp_path, part, PARTS[part]("cpu", True))
    assert wrong(tmp_path) == 0
    assert all(each in table(tmp_path) for each in what)


@pytest.mark.parametrize("geometry", ["1B", "2B"])
def test_a_large_model_is_left_out_without_a_gpu(geometry):
    (only,) = PARTS[f"language {geometry}"]("cpu", False)
    assert only == skipped("all of it", f"the {geometry} geometry is for a GPU")


def test_a_value_beyond_its_bound_or_not_a_number_is_counted_and_a_row_that_was_skipped_is_not(tmp_path):
    rows = [row("a", 0.5, "relative error", 1.0), row("b", 2.0, "x", 1.0), row("c", float("nan"), "x", 1.0)]
    write(tmp_path, "correctness", [*rows, skipped("d", "no time")])
    assert wrong(tmp_path) == 2
