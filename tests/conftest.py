"""Fixtures: small, quick, without network."""

import os

import pytest
import torch
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def quiet_and_single_threaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """One thread (forked processes then cannot dead-lock in a thread pool), and every run in its own folder."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def pictures_are_not_rendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave every picture an empty file, as to render one takes longer than a tiny fit, unless a test asks for it."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture
def rendered() -> None:
    """Render the pictures of a test."""
