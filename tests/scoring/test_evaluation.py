"""Scoring leaves no trace: modes, statistics, gradients, random numbers and the order of batches are as without it."""

import random

import numpy as np
import pytest
import torch
from lightning import Callback
from torch import nn

import flow_lightning as fl
from flow_lightning.scoring.evaluation import evaluation
from tests.examples import LinearRegression, RegressionData, fit


def draws():
    return torch.rand(1), np.random.rand(), random.random()


def test_evaluation_restores_modes_and_streams_and_records_no_graph():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draws()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with evaluation(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.rand(3, 2)).requires_grad
        draws(), draws()
    assert draws() == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluation(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


class Unweighted(fl.FlowWeightingCallback):
    """Scores and computes everything, then sets all weights to 1: training must be as without it."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        pl_module.sample_weights.weights = torch.ones(len(self.weights))


class Snapshot(Callback):
    """Take down everything that scoring could disturb, before the first batch."""

    def on_train_start(self, trainer, pl_module):
        self.modes = {name: module.training for name, module in pl_module.named_modules()}
        self.buffers = {name: value.clone() for name, value in pl_module.named_buffers()}
        self.gradients = {name: value.grad for name, value in pl_module.named_parameters()}
        self.requires_grad = [value.requires_grad for value in pl_module.parameters()]
        self.streams = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        self.stage = trainer.state.stage


def snapshot(*callbacks):
    """Fit a model of which a part is in evaluation mode, as a user left it."""
    module, taken = LinearRegression(), Snapshot()
    module.body[1].eval()
    fit(*callbacks, taken, module=module)
    return taken


def test_modes_statistics_gradients_and_random_numbers_are_as_without_it():
    with_flow, without = snapshot(fl.FlowWeightingCallback()), snapshot()
    assert with_flow.modes == without.modes and with_flow.modes["body.1"] is False and with_flow.modes["body.2"] is True
    assert with_flow.stage == without.stage
    assert all(torch.equal(value, without.buffers[name]) for name, value in with_flow.buffers.items())
    assert with_flow.gradients == without.gradients == dict.fromkeys(with_flow.gradients)
    assert with_flow.requires_grad == without.requires_grad
    assert torch.equal(with_flow.streams[0], without.streams[0])
    assert np.array_equal(with_flow.streams[1], without.streams[1])
    assert with_flow.streams[2] == without.streams[2]


@pytest.mark.parametrize("loader", [{}, {"num_workers": 2, "persistent_workers": True}], ids=["0", "persistent"])
def test_batches_and_training_are_as_without_it(loader):
    """Two epochs in the same order, none empty, and with weights of 1 the same parameters to the last bit."""
    plain, _ = fit(data=RegressionData(**loader), max_epochs=2)
    flow, _ = fit(Unweighted(), data=RegressionData(**loader), max_epochs=2)
    assert len(flow.seen) == len(plain.seen) == 12
    assert all(torch.equal(one, other) for one, other in zip(flow.seen, plain.seen))
    torch.testing.assert_close(flow.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_gradients_that_were_there_stay():
    module, kept = LinearRegression(), []

    class Gradient(Callback):
        def __init__(self, value=None):
            self.value = value

        def on_fit_start(self, trainer, pl_module):
            if self.value is not None:
                pl_module.head.weight.grad = self.value
            kept.append(pl_module.head.weight.grad)

    fit(Gradient(torch.ones(1, 8)), fl.FlowWeightingCallback(), Gradient(), module=module)
    assert kept[1] is kept[0] and torch.equal(kept[1], torch.ones(1, 8))
