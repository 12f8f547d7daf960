"""What the benchmarks share: time and peak memory of calls and fits, processes of their own, the spread of ratios."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback


def now() -> float:
    """Return the time in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(Callback):
    """Takes the seconds of a Lightning fit: of training, and before it, where FlowWeightingCallback scores."""

    def on_fit_start(self, *_: Any) -> None:
        self.started = now()

    def on_train_start(self, *_: Any) -> None:
        started, self.started = self.started, now()
        self.before = self.started - started

    def on_train_end(self, *_: Any) -> None:
        self.seconds = now() - self.started


def memory(name: str) -> float:
    """Return VmRSS or VmHWM of this process, in MB of a million bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def measured(function: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Call a function; return what it returns, its seconds, and its peak of memory above that before, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = memory("VmRSS"), time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - started, memory("VmHWM") - before


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def in_turn(first: str, second: str, rounds: int) -> list[tuple[str, ...]]:
    """Return the order of both in each round: each goes first in every other one."""
    return [(first, second) if round_ % 2 else (second, first) for round_ in range(rounds)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return median, least and most."""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"
