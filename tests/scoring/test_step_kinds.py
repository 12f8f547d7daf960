"""Which steps can be scored, and which of their losses are the samples'."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from flow_lightning.scoring.step_kinds import _CopyViews
from tests.examples import slow
from tests.scoring.test_score import NO_MEMORY
from tests.unchanged import Classifier, data, fit


class Shuffled(Classifier):
    """Changes the order of the samples, in training alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = torch.randperm(len(batch[0])) if self.training else torch.arange(len(batch[0]))
        return F.cross_entropy(self.net(batch[0][order]), batch[1][order])


class Checkpointed(Classifier):
    """The loss is computed inside of a checkpoint of activations, and again in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return checkpoint(lambda x, y: F.cross_entropy(self.net(x), y), *batch, use_reentrant=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Shuffled, "Shuffled.training_step puts the samples of a batch in another order in training"),
        (Checkpointed, "Checkpointed.training_step cannot be weighed: torch.utils.checkpoint"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(kind(), data(), fl.FlowWeightingCallback())


def test_samples_mixed_in_training_alone_are_told() -> None:
    class Mixed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            x = 0.6 * x + 0.4 * x[torch.randperm(len(x))] if self.training else x
            return F.cross_entropy(self.net(x), y)

    with pytest.warns(UserWarning, match="Mixed.training_step mixes the samples of a batch in training"):
        fit(Mixed(), data(), fl.FlowWeightingCallback(), max_steps=1)


class Anchored(Classifier):
    """A penalty that is computed by a loss of torch, of `[3, 8]` parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = self.net[3] = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.net[4].weight
        return F.cross_entropy(self.net(batch[0]), batch[1]) + 5 * F.mse_loss(weight, torch.ones_like(weight))


@pytest.mark.parametrize(("samples", "size"), [(11, 5), (4, 1), (6, 3), (7, 6)])
def test_a_penalty_is_left_alone_in_batches_whose_size_divides_it_too(samples: int, size: int) -> None:
    dataset = TensorDataset(*(part[:samples] for part in data().tensors))
    module, flow = Anchored(), fl.FlowWeightingCallback()
    by_hand, x, y = copy.deepcopy(module), *dataset.tensors
    fit(module, dataset, flow, loader=DataLoader(dataset, size), max_epochs=1)
    torch.testing.assert_close(flow.weights.losses, F.cross_entropy(by_hand.net(x), y, reduction="none"))
    optimizer, anchor = by_hand.configure_optimizers(), by_hand.net[4].weight
    for start in range(0, samples, size):
        losses = F.cross_entropy(by_hand.net(x[start : start + size]), y[start : start + size], reduction="none")
        optimizer.zero_grad()
        weighted = (flow.weights.weights[start : start + size] * losses).mean()
        (weighted + 5 * F.mse_loss(anchor, torch.ones_like(anchor))).backward()
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), by_hand.state_dict())


class Crowded(Classifier):
    """Has memory for `most` samples at a time."""

    def __init__(self, most: int, error: RuntimeError) -> None:
        super().__init__()
        self.most, self.error = most, error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > self.most:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("error", "probe"), [(NO_MEMORY[0], False), slow(NO_MEMORY[1], True)])
def test_a_first_batch_that_does_not_fit_is_looked_at_in_part(error: RuntimeError, probe: bool) -> None:
    """Of a scoring batch of 16 the first 4 fit; a probe that sees features of other roundings ends within 1e-3."""
    found = []
    for most, size in ((23, 4), (4, 16)):
        flow, module = fl.FlowWeightingCallback(scoring_dataset=DataLoader(data(), size)), Crowded(most, error)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fit(
                module,
                data(),
                flow,
                *[fl.LinearProbeCallback(refit=False)] * probe,
                loader=DataLoader(data(), 4),
                max_steps=1,
            )
        halvings = [each for each in seen if "samples at a time takes too much memory" in str(each.message)]
        found.append((flow.weights.losses, len(halvings)))
    assert [count for _, count in found] == [0, 4]  # 16 and 8, in the inspection and in scoring
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-3 if probe else 1e-6)


def test_a_first_sample_that_does_not_fit_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"Scoring 1 sample\(s\) at a time takes more memory"):
        fit(Crowded(0, NO_MEMORY[0]), data(), fl.FlowWeightingCallback())


def test_samples_that_are_views_are_copied_without_what_they_are_views_of() -> None:
    whole = torch.arange(1000.0)
    with _CopyViews():
        part = copy.deepcopy({"x": [whole[3:5]]})["x"][0]
    assert torch.equal(part, whole[3:5])
    assert part.untyped_storage().nbytes() == 8


@pytest.mark.parametrize("batch_size", [32, 200])
def test_scoring_takes_one_forward_pass_and_a_short_look_at_the_step(batch_size: int) -> None:
    class Counting(Classifier):
        samples = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            type(self).samples += len(batch[0])
            return super().training_step(batch, batch_idx)

    fl.score(Counting(), DataLoader(data(n=4000), batch_size))
    assert 4000 <= Counting.samples <= 1.05 * 4000
