"""What the parts share: rows of the table, time and memory of a step, the machine's own speed.

In: a function to measure. Out: rows. Next: `correctness.py`, `vision.py`, `language.py`, `processes.py`.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


def row(what: str, value: float, unit: str, bound: float | None = None) -> Row:
    """Make a row; a value above the bound, or NaN, is wrong."""
    return {"what": what, "value": value, "unit": unit, "bound": bound}


def skipped(what: str, why: str) -> Row:
    """Make a row that says why something was not measured."""
    return {"what": what, "value": None, "unit": f"not measured: {why}", "bound": None}


def failed(what: str, error: Exception) -> Row:
    """Make a row of something that ended in an error: it counts as wrong."""
    return row(what, math.nan, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", 0.0)


def memory_row(what: str, device: str) -> Row:
    """Make a row of the device's peak memory since `reset_peak_memory_stats`."""
    if device != "cuda":
        return skipped(f"{what}, peak memory", "only of a GPU")
    return row(f"{what}, peak memory", torch.cuda.max_memory_allocated() / 2**20, "MiB")


def passes(
    losses: Callable[[], Tensor], optimizer: torch.optim.Optimizer, weights: Tensor
) -> dict[str, Callable[[], Any]]:
    """Make what is timed of a model: a scoring, a plain and a weighted step, by name."""

    @torch.no_grad()
    def scoring() -> None:
        losses().cpu()

    def step(weights: Tensor | float) -> None:
        optimizer.zero_grad()
        (weights * losses()).mean().backward()
        optimizer.step()

    return {"scoring": scoring, "plain step": partial(step, 1.0), "weighted step": partial(step, weights)}


def timed(step: Callable[[], Any], device: str, tiny: bool) -> float:
    """Return the median seconds of a step after a warm-up; the device's peak of memory counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(3 if tiny else 12):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def gemm_peak(device: str, tiny: bool, dtype: torch.dtype, size: int = 8192) -> float:
    """Measure the floating-point operations per second of a large product of matrices, the most a model can reach."""
    size = 128 if tiny else size
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: one @ two, device, tiny)
