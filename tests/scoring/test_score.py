"""Scoring by two processes equals one over one: every sample once, ranks without samples included."""

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from flow_lightning.scoring.score import is_out_of_memory, score_dataset
from tests.examples import LinearRegression, RegressionData, expected_losses, fit, make_trainer, regression_data
from tests.images import PictureData, tiny_module

TWO = {"devices": 2, "strategy": "ddp_fork"}


class Record(fl.FlowWeightingCallback):
    """Each rank writes down the weights that it trains with; processes do not share memory."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        torch.save(self.weights.state_dict(), f"rank{trainer.global_rank}.pt")


def states():
    return [torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("n", [23, 7, 1])
def test_two_processes_weigh_as_one(n):
    """An odd length: no duplicate enters the median, index for index the same on both ranks; one without a sample."""
    data, one, modules = regression_data(n), fl.FlowWeightingCallback(), [LinearRegression() for _ in range(2)]
    for module, callback, settings in zip(modules, (one, Record()), ({}, TWO)):
        module.body[1].eval()  # BatchNorm cannot be trained on one sample
        fit(callback, module=module, data=RegressionData(data), **settings)
    for state in states():
        assert state["temperature"] == one.weights.temperature  # to the last bit: the batches are the same
        assert torch.equal(state["losses"], one.weights.losses)
        assert torch.equal(state["weights"], one.weights.weights)
        np.testing.assert_allclose(state["losses"].numpy(), expected_losses(data), rtol=1e-4, atol=1e-7)


class RecordProbe(fl.LinearProbeCallback):
    def on_train_start(self, trainer, pl_module):
        found = [self.probe.losses, self.probe.strength, pl_module.head.weight.detach()]
        torch.save(found, f"rank{trainer.global_rank}.pt")


def test_two_processes_probe_as_one():
    one = fl.LinearProbeCallback(folds=3)
    make_trainer(one).fit(tiny_module(), datamodule=PictureData(n=29))
    make_trainer(RecordProbe(folds=3), **TWO).fit(tiny_module(), datamodule=PictureData(n=29))
    for losses, strength, weight in states():
        assert strength == one.probe.strength
        assert torch.equal(losses, one.probe.losses) and torch.equal(weight, one.probe.head.weight)


PLAIN = TensorDataset(torch.arange(11.0))


class Shifted(fl.IndexedDataset):
    """Numbers its samples from 1."""

    def __getitem__(self, index):
        return super().__getitem__(index)._replace(index=index + 1)


def scored(dataset, function, module=None, **settings):
    """Apply a function to a data set within a fit."""
    results = []

    class Score(Callback):
        def on_fit_start(self, trainer, pl_module):
            results.append(score_dataset(trainer, pl_module, DataLoader(dataset, batch_size=4), function, "x"))

    fit(Score(), max_epochs=0, module=module, **settings)
    return results[0]


def test_values_come_by_sample_also_where_a_data_set_has_no_index():
    squares, more = scored(fl.IndexedDataset(PLAIN), lambda batch: (batch.sample[0] ** 2, batch.sample[0] + 1))
    assert squares.tolist() == [i**2 for i in range(11)] and more.tolist() == list(range(1, 12))
    assert scored(PLAIN, lambda batch: (batch[0],))[0].tolist() == list(range(11))


def test_a_data_set_that_numbers_otherwise_is_refused():
    with pytest.raises(ValueError, match="position in the training data set"):
        scored(Shifted(PLAIN), lambda batch: (batch.index,))


def test_scoring_goes_through_the_transfer_hooks_and_the_precision():
    seen = []

    class Hooked(LinearRegression):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            seen.append("before")
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append("after")
            return batch

    module, data = Hooked(), fl.IndexedDataset(regression_data())
    (values,) = scored(data, lambda batch: (module(batch.sample[0]),), module, precision="bf16-mixed")
    assert seen == ["before", "after"] * 6 and values.dtype == torch.bfloat16


#: What torch says where memory is short, on a GPU and on a CPU.
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried 9 bytes"),
]


class Crowded(LinearRegression):
    """Fits so many samples at a time into memory, and notes how many it was given."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        self.sizes.append(len(losses))
        if len(losses) > self.most:
            raise self.error
        return losses


@pytest.mark.parametrize("error", NO_MEMORY)
def test_devices_and_the_cpu_say_in_other_words_that_there_is_no_memory(error):
    assert is_out_of_memory(error) and not is_out_of_memory(ValueError(str(error)))


def test_a_batch_that_does_not_fit_is_scored_in_parts():
    module, data = Crowded(3, NO_MEMORY[1]), regression_data(45)
    with pytest.warns(UserWarning, match="Scoring 16 samples at a time takes too much memory"):
        weights = fl.score(module, DataLoader(fl.IndexedDataset(data), batch_size=16))
    np.testing.assert_allclose(weights.losses.numpy(), expected_losses(data), rtol=1e-4, atol=1e-7)
    assert module.sizes == [16, 8, 4] + [2] * 8 + [2] * 8 + [2] * 6 + [1]  # later batches do not fail anew


class CrowdedStep(LightningModule):
    """Declares no losses, optimises by hand, and runs out of memory after its loss, but for the first batch."""

    def __init__(self):
        super().__init__()
        self.model, self.automatic_optimization = LinearRegression(), False

    def training_step(self, batch, batch_idx):
        (x, y), index = batch
        self.manual_backward(torch.nn.functional.mse_loss(self.model(x), y))
        if len(x) > 2 and index.min() >= 4:
            raise NO_MEMORY[0]


def test_a_training_step_that_breaks_off_without_memory_is_run_anew_in_parts():
    data = regression_data(9)
    weights = fl.score(CrowdedStep(), DataLoader(fl.IndexedDataset(data), batch_size=4))
    np.testing.assert_allclose(weights.losses.numpy(), expected_losses(data), rtol=1e-4, atol=1e-7)


def test_one_sample_that_does_not_fit_and_shards_are_explained(monkeypatch):
    loader = DataLoader(fl.IndexedDataset(regression_data(5)), batch_size=5)
    with pytest.raises(torch.OutOfMemoryError, match=r"Scoring 1 sample\(s\) .* 2\.00 GiB.* smaller batch"):
        fl.score(Crowded(0, NO_MEMORY[0]), loader)
    monkeypatch.setattr("flow_lightning.scoring.alone._Here.restore_checkpoint_after_setup", True)
    with pytest.raises(torch.OutOfMemoryError, match=r"Scoring 5 sample\(s\)"):
        fl.score(Crowded(3, NO_MEMORY[0]), loader)


def test_an_error_that_is_not_about_memory_comes_through_at_once():
    module, error = Crowded(3, RuntimeError("shapes do not match")), "^shapes do not match$"
    with pytest.raises(RuntimeError, match=error):
        fl.score(module, DataLoader(fl.IndexedDataset(regression_data(8)), batch_size=8))
    assert module.sizes == [8] and "batch_samples" not in vars(module)
