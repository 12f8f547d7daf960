"""A user's own project, through public names alone: linear regression with squared errors."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import flow_lightning as fl

#: Values of a parametrized test that run by `pytest -m slow` alone: others among them see nearly the same.
slow = partial(pytest.param, marks=pytest.mark.slow)


class LinearRegression(fl.WeightedLossModule):
    """Squared error; dropout and BatchNorm are there to be disturbed."""

    def __init__(self, learning_rate: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)
        self.learning_rate = learning_rate
        self.seen: list[Tensor] = []
        self.scored = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze(1)

    def sample_losses(self, batch: Any) -> Tensor:
        (x, y), index = batch
        if not self.training:
            self.scored += len(index)
        return (self(x) - y).square()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch.index.cpu())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def regression_data(n: int = 23, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, x.sum(1) + torch.randn(n, generator=generator))


def expected_losses(dataset) -> np.ndarray:
    """Squared errors of the fresh model, one sample at a time, in numpy's float64."""
    module = LinearRegression().eval()
    with torch.no_grad():
        predictions = [module(dataset[i][0][None]).item() for i in range(len(dataset))]
    return (np.array(predictions) - np.array([dataset[i][1].item() for i in range(len(dataset))])) ** 2


class RegressionData(LightningDataModule):
    """A data module as users have them, with the one line that FLOW asks for."""

    def __init__(self, dataset: Dataset[Any] | None = None, **loader: Any) -> None:
        super().__init__()
        self.dataset = fl.IndexedDataset(regression_data() if dataset is None else dataset)
        self.loader = {"batch_size": 4, "shuffle": True} | loader

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, **self.loader)


class Kill(Callback):
    """Stands for a run that dies before a batch."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.left == 0:
            raise SystemExit
        self.left -= 1


def chain(fit_once: Callable[..., Any], *kills: int) -> Any:
    """Fit, die before a batch, resume from the last checkpoint, and so on; return what the last fit leaves."""
    shutil.rmtree("ckpt", ignore_errors=True)
    for after in kills:
        with suppress(SystemExit):
            fit_once(Kill(after), ckpt_path="last")
    return fit_once(ckpt_path="last")


def make_trainer(*callbacks: Any, make: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": "run",
        "log_every_n_steps": 1,
    }
    return make(callbacks=list(callbacks), **(defaults | settings))


def fit(
    *callbacks: Any,
    module: LightningModule | None = None,
    data: Any = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[Any, Trainer]:
    """Fit from a fixed seed; the same call without a callback is the run to compare with."""
    seed_everything(7, verbose=False)
    module = LinearRegression() if module is None else module
    trainer = make_trainer(*callbacks, **settings)
    trainer.fit(module, datamodule=RegressionData() if data is None else data, ckpt_path=ckpt_path)
    return module, trainer
