"""The path of indices and weights at a million samples, against numpy."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import flow_lightning as fl
from tests.examples import make_trainer

COUNT = 1_000_000


class Indices(Dataset):
    """Samples that are nothing but their index, read by batch."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return indices


class Module(fl.WeightedLossModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def sample_losses(self, batch):
        return loss_of(batch["index"]) * self.scale

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loss_of(index):
    """A loss for each index, spread over [0.01, 5)."""
    return ((index * 2_654_435_761) % 1_000_003).float() / 1_000_003 * 4.99 + 0.01


def loader(batch_size, order=range(COUNT)):
    return DataLoader(Indices(), batch_size, sampler=order, collate_fn=lambda batch: {"index": torch.tensor(batch)})


def test_a_million_samples():
    flow, module, index = fl.FlowWeightingCallback(), Module(), [999_999, 0, 123_456, 500_000]
    module.scoring_dataloader = lambda: loader(50_000)
    make_trainer(flow, max_steps=1).fit(module, loader(8, index * 2))
    losses = loss_of(torch.arange(COUNT)).numpy()
    np.testing.assert_array_equal(flow.weights.losses.numpy(), losses)
    tau = np.median(losses)
    assert flow.weights.temperature == tau
    expected = np.exp(-losses.astype(np.float64) / tau)
    np.testing.assert_allclose(flow.weights.weights.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(flow.weights.lookup(torch.tensor(index)).numpy(), expected[index], rtol=1e-6)
    assert flow.weights.losses.nbytes + flow.weights.weights.nbytes == 8 * COUNT
    summary, size = flow.weights.summary(), expected.sum() ** 2 / (expected**2).sum()
    np.testing.assert_allclose(summary["flow/mean_weight"], expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(summary["flow/effective_sample_size"], size, rtol=1e-6)
    again = fl.SampleWeights.load("run/flow_weights.safetensors")
    assert torch.equal(again.weights, flow.weights.weights)
