"""Scoring without a fit: the losses of a loop by hand, for plain torch, Fabric and LightningModules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Fabric, Trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, WeightedRandomSampler

import flow_lightning as fl
from tests.examples import LinearRegression, RegressionData, expected_losses, make_trainer, regression_data
from tests.processes import launch
from tests.unchanged import CASES, Classifier, data, fit

DATA = regression_data()


def squares(model, batch):
    assert not model.training
    return (model(batch[0]) - batch[1]).square()


class Network(nn.Module):
    """LinearRegression without Lightning."""

    def __init__(self):
        super().__init__()
        own = LinearRegression()
        self.body, self.head = own.body, own.head

    def forward(self, x):
        return self.head(self.body(x)).squeeze(1)


LOADERS = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 5, "shuffle": True, "drop_last": True},
    "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler(torch.rand(23), 9)},
    "own batches": {"batch_sampler": BatchSampler(range(7), 3, False)},
    "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2},
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_plain_model_is_scored_in_the_order_of_the_data_set(name):
    weights = fl.score(Network(), DataLoader(DATA, **LOADERS[name]), squares)
    losses = expected_losses(DATA)
    np.testing.assert_allclose(weights.losses.numpy(), losses, rtol=1e-4)
    np.testing.assert_allclose(weights.of([7, 2]).numpy(), np.exp(-losses / np.median(losses))[[7, 2]], rtol=1e-4)


def test_rule_quantile_and_temperature_are_taken():
    losses, loader = expected_losses(DATA), DataLoader(DATA, 4)
    third = fl.score(Network(), loader, squares, quantile=0.25)
    assert third.temperature == pytest.approx(np.quantile(losses, 0.25), rel=1e-5)
    below = fl.score(Network(), loader, squares, weighting="threshold", temperature=1.0)
    assert below.weights.tolist() == (losses < 1).tolist()


def test_nothing_is_left_behind():
    model, loader = Network().train(), DataLoader(DATA, 4, True)
    model.body.eval()
    model.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random, names = [part.training for part in model.modules()], torch.get_rng_state(), set(vars(model))
    fl.score(model, loader, squares)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [part.training for part in model.modules()] == modes and set(vars(model)) == names
    assert torch.equal(torch.get_rng_state(), random)
    assert [parameter.requires_grad for parameter in model.head.parameters()] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["cross_entropy", "bce", "two terms"])
def test_an_unchanged_lightning_module_has_the_weights_of_a_fit(name):
    dataset, module, flow = data(CASES[name]), Classifier(CASES[name].loss), fl.FlowWeightingCallback()
    weights = fl.score(module, DataLoader(dataset, 5, True))
    fit(Classifier(CASES[name].loss), dataset, flow, max_steps=1)
    assert torch.equal(weights.losses, flow.weights.losses) and torch.equal(weights.weights, flow.weights.weights.cpu())
    assert weights.fingerprint == flow.weights.fingerprint and module.seen == []


def test_a_module_with_sample_losses_keeps_its_trainer():
    module = LinearRegression()
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=RegressionData())
    module.scored = 0
    fl.score(module, RegressionData().train_dataloader())
    assert module.scored == 23 and module.trainer is trainer and module.training


@pytest.mark.parametrize("wrap", [lambda fabric, model: fabric.setup(model), lambda fabric, model: model])
def test_fabric_gives_the_same(wrap):
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(DATA, 4, True, num_workers=1))
    weights = fl.score(wrap(fabric, Network()), loader, squares)
    np.testing.assert_allclose(weights.losses.numpy(), expected_losses(DATA), rtol=1e-4)


def score_in_fabric() -> None:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    model, loader = fabric.setup(Network()), fabric.setup_dataloaders(DataLoader(DATA, 5, True))
    seen = []

    def losses(model, batch):
        seen.extend(batch[1].tolist())
        return squares(model, batch)

    weights = fl.score(model, loader, losses)
    torch.save((weights.losses, len(seen)), f"{fabric.global_rank}.pt")


def test_processes_share_the_work_and_have_the_same_weights():
    launch(score_in_fabric)
    for rank, batches in enumerate([[5, 5, 3], [5, 5, 5]]):  # the last one of rank 1 for the wrapper's sake
        losses, seen = torch.load(f"{rank}.pt")
        np.testing.assert_allclose(losses.numpy(), expected_losses(DATA), rtol=1e-4)
        assert seen == sum(batches)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("model", "loader", "function", "error", "message"),
    [
        (Network(), DataLoader(DATA, 4), None, TypeError, r"Network is no LightningModule.*sample_losses"),
        (Network(), DataLoader(Stream(), 4), squares, TypeError, "not a map-style data set"),
        (Network(), DataLoader(DATA, 4), lambda m, b: squares(m, b).mean(), ValueError, "one loss per sample"),
        (Classifier(lambda x, y: F.cross_entropy(x @ x.T, y)), DataLoader(data(), 5), None, ValueError, "depends on"),
    ],
)
def test_what_cannot_be_scored_names_the_fix(model, loader, function, error, message):
    with pytest.raises(error, match=message):
        fl.score(model, loader, function)


def test_a_trainer_says_nothing_and_later_ones_do(caplog, capsys):
    fl.score(Network(), DataLoader(DATA, 4), squares)
    assert caplog.text == "" and "TPU" not in capsys.readouterr().err
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        Trainer(accelerator="cpu", logger=False)
    assert "TPU" in caplog.text
