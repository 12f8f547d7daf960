"""Fixtures: small, quick, without network."""

import gc
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.fabric.utilities import registry
from matplotlib.figure import Figure
from PIL import Image

from flow_lightning.files import write_bytes
from flow_lightning.report import pictures

# Each Trainer asks the metadata of all installed packages for callbacks, which takes longer than many a fit of a test.
registry.entry_points = cache(registry.entry_points)


def pytest_collection_finish() -> None:
    """Leave all that was imported out of garbage collection, which walked through it all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True)
def quiet_and_single_threaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """One thread (forked processes then cannot dead-lock in a thread pool), and every run in its own folder."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def pictures_are_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every picture one pixel, as to draw one takes longer than a tiny fit, unless a test asks for it."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")

    def savefig(figure: Figure, file: Any, format: str = "png", **_: Any) -> None:
        file.write(content.getvalue() if format == "png" else b"<svg/>")

    @contextmanager
    def picture(path: Any, widths: Sequence[float], height: float) -> Iterator[tuple[Any, Iterator[Any]]]:
        yield MagicMock(), (MagicMock() for _ in widths)
        write_bytes(path, content.getvalue())

    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", savefig)
        monkeypatch.setattr(pictures, "picture", picture)


@pytest.fixture
def rendered() -> None:
    """Render the pictures of a test."""
