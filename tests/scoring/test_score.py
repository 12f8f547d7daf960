"""Scoring by two processes equals one over one: every sample once, ranks without samples included."""

import numpy as np
import pytest
import torch
from lightning import Callback
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from flow_lightning.scoring.score import score_dataset
from tests.examples import LinearRegression, RegressionData, expected_losses, fit, make_trainer, regression_data
from tests.images import PictureData, tiny_module

TWO = {"devices": 2, "strategy": "ddp_fork"}


class Record(fl.FlowWeightingCallback):
    """Each rank writes down the weights that it trains with; processes do not share memory."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        torch.save(self.weights.state_dict(), f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("n", [23, 7])
def test_two_processes_weigh_as_one(n):
    """An odd length: no duplicate enters the median, index for index the same on both ranks."""
    data = regression_data(n)
    one = fl.FlowWeightingCallback()
    fit(one, data=RegressionData(data))
    fit(Record(), data=RegressionData(data), **TWO)
    states = [torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in states:
        assert state["temperature"] == one.weights.temperature  # to the last bit: the batches are the same
        assert torch.equal(state["losses"], one.weights.losses.cpu())
        np.testing.assert_allclose(state["losses"].numpy(), expected_losses(data), rtol=1e-4, atol=1e-7)
    assert torch.equal(states[0]["weights"], states[1]["weights"])


def test_a_rank_without_a_sample_works():
    data = regression_data(1)
    module = LinearRegression()
    module.body[1].eval()
    fit(Record(), data=RegressionData(data, batch_size=1), module=module, **TWO)
    states = [torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    np.testing.assert_allclose(states[0]["losses"].numpy(), expected_losses(data), rtol=1e-5)
    assert torch.equal(states[0]["losses"], states[1]["losses"])


class RecordProbe(fl.LinearProbeCallback):
    def on_train_start(self, trainer, pl_module):
        torch.save(
            [self.probe.losses, self.probe.strength, pl_module.head.weight.detach()], f"probe{trainer.global_rank}.pt"
        )


def test_two_processes_probe_as_one():
    one = fl.LinearProbeCallback(folds=3)
    make_trainer(one).fit(tiny_module(), datamodule=PictureData(n=29))
    make_trainer(RecordProbe(folds=3), **TWO).fit(tiny_module(), datamodule=PictureData(n=29))
    ranks = [torch.load(f"probe{rank}.pt", weights_only=True) for rank in (0, 1)]
    for losses, strength, weight in ranks:
        assert strength == one.probe.strength
        assert torch.equal(losses, one.probe.losses) and torch.equal(weight, one.probe.head.weight)


DATA = fl.IndexedDataset(TensorDataset(torch.arange(11.0)))


class Shifted(fl.IndexedDataset):
    """Numbers its samples from 1."""

    def __getitem__(self, index):
        return super().__getitem__(index)._replace(index=index + 1)


def scored(dataset, function, **settings):
    """Apply a function to a data set within a fit."""
    results = []

    class Score(Callback):
        def on_fit_start(self, trainer, pl_module):
            results.append(score_dataset(trainer, pl_module, DataLoader(dataset, batch_size=4), function, "x"))

    fit(Score(), max_epochs=0, **settings)
    return results[0]


def test_values_come_by_sample():
    squares, shifted = scored(DATA, lambda batch: (batch.sample[0] ** 2, batch.sample[0] + 1))
    assert squares.tolist() == [i**2 for i in range(11)] and shifted.tolist() == list(range(1, 12))


def test_a_data_set_without_an_index_is_scored_by_position():
    (values,) = scored(TensorDataset(torch.arange(11.0)), lambda batch: (batch[0],))
    assert values.tolist() == list(range(11))


def test_a_data_set_that_numbers_otherwise_is_refused():
    with pytest.raises(ValueError, match="position in the training data set"):
        scored(Shifted(TensorDataset(torch.arange(11.0))), lambda batch: (batch.index,))


def test_scoring_goes_through_the_transfer_hooks_and_the_precision():
    seen = []

    class Hooked(LinearRegression):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            seen.append("before")
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append("after")
            return batch

    class Sweep(fl.FlowWeightingCallback):
        def on_fit_start(self, trainer, pl_module):
            loader = trainer.datamodule.train_dataloader()
            (result,) = score_dataset(trainer, pl_module, loader, lambda batch: (pl_module(batch.sample[0]),), "x")
            seen.append(result.dtype)

    make_trainer(Sweep(), precision="bf16-mixed", max_epochs=0).fit(Hooked(), datamodule=RegressionData())
    assert seen == ["before", "after"] * 6 + [torch.bfloat16]
