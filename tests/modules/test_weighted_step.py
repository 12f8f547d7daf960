"""Unchanged modules: their weighted steps against loops written by hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import flow_lightning as fl
from tests.unchanged import CASES, Case, Classifier, data, fit


def by_hand(case: Case, weights: Tensor, dataset: Any, epochs: int = 2) -> Classifier:
    """Train the same module by a plain loop, each loss weighted by hand."""
    module = Classifier(case.loss, case.outputs)
    optimizer = module.configure_optimizers()
    torch.manual_seed(2)
    for _ in range(epochs):
        for start in range(0, len(dataset), 5):
            index = torch.arange(start, min(start + 5, len(dataset)))
            x, y = dataset[index.tolist()]
            logits = module.net(x)
            if case.weighted is not None:
                loss = case.weighted(logits, y, weights[index])
            else:
                loss = (weights[index] * case.losses(logits, y)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module


@pytest.mark.parametrize("name", CASES)
def test_losses_and_steps_are_those_of_a_loop_by_hand(name: str) -> None:
    case = CASES[name]
    dataset = data(case)
    module = Classifier(case.loss, case.outputs)
    with torch.no_grad():
        x, y = dataset.tensors
        expected = case.losses(copy.deepcopy(module).eval().net(x), y)
    flow = fl.FlowWeightingCallback()
    fit(module, dataset, flow)
    torch.testing.assert_close(flow.weights.losses, expected, rtol=1e-5, atol=1e-7)
    by_loop = by_hand(case, flow.weights.weights, dataset)
    for (name, mine), theirs in zip(module.state_dict().items(), by_loop.state_dict().values()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_a_first_batch_whose_loss_is_zero_leaves_the_proof_to_the_next_one() -> None:
    case = Case(lambda x, y: F.mse_loss(x * y, 0 * x), lambda x, y: (x * y).square().mean(1), CASES["mse"].targets)
    dataset = data(case)
    dataset.tensors[1][:5] = 0
    flow, module = fl.FlowWeightingCallback(), Classifier(case.loss)
    fit(module, dataset, flow)
    expected = by_hand(case, flow.weights.weights, dataset)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_losses_may_be_masked_in_place() -> None:
    def masked(logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none")
        losses *= targets != 0
        return losses.mean()

    flow, dataset = fl.FlowWeightingCallback(), data()
    fit(Classifier(masked), dataset, flow)
    assert torch.equal(flow.weights.losses == 0, dataset.tensors[1] == 0)


def test_views_that_are_made_in_training_alone_are_refused() -> None:
    class TwoViews(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            if self.training:
                x, y = torch.cat([x, x + 0.1]), torch.cat([y, y])
            return super().training_step((x, y), batch_idx)

    with pytest.raises(RuntimeError, match="2 rows for each sample in training, but of 1 in evaluation"):
        fit(TwoViews(), data(), fl.FlowWeightingCallback())
