"""Fixtures: small, quick, without network."""

import gc
import os
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image


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
def pictures_are_not_rendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every picture one pixel, as to render one takes longer than a tiny fit, unless a test asks for it."""

    def savefig(figure: Figure, file: Any, format: str = "png", **_: Any) -> None:
        if format == "png":
            Image.new("RGB", (1, 1)).save(file, "PNG")
        else:
            file.write(b"<svg/>")

    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def rendered() -> None:
    """Render the pictures of a test."""
