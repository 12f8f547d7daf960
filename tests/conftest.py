"""Fixtures: small, quick, without network."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet_and_single_threaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """One thread (forked processes then cannot dead-lock in a thread pool), and every run in its own folder."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    monkeypatch.chdir(tmp_path)
