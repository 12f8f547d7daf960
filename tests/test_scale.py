"""The path of indices and weights at ten million samples, against numpy."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import flow_lightning as fl
from tests.examples import make_trainer

COUNT = 10_000_000


def loss_of(index):
    """A loss for each index, spread over [0.01, 5)."""
    return ((index * 2_654_435_761) % 1_000_003).float() / 1_000_003 * 4.99 + 0.01


class Indices(Dataset):
    """Samples that are nothing but their index, read by batch."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return indices


def collate(indices):
    return {"index": torch.tensor(indices)}


class Module(fl.WeightedLossModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def sample_losses(self, batch):
        return loss_of(batch["index"]) * self.scale

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        return DataLoader(Indices(), 1000, collate_fn=collate, sampler=[9_999_999, 0, 1_234_567, 5_000_000] * 2)

    def scoring_dataloader(self):
        return DataLoader(Indices(), batch_size=100_000, collate_fn=collate)


def test_ten_million_samples():
    flow, module = fl.FlowWeightingCallback(), Module()
    make_trainer(flow, max_steps=1).fit(module)
    losses = loss_of(torch.arange(COUNT)).numpy()
    np.testing.assert_array_equal(flow.weights.losses.numpy(), losses)
    tau = np.median(losses)
    assert flow.weights.temperature == tau
    expected = np.exp(-losses.astype(np.float64) / tau)
    np.testing.assert_allclose(flow.weights.weights.numpy(), expected, rtol=1e-6)
    index = torch.tensor([9_999_999, 0, 1_234_567])
    np.testing.assert_allclose(flow.weights.of(index).numpy(), expected[index.numpy()], rtol=1e-6)
    assert flow.weights.losses.nbytes + flow.weights.weights.nbytes == 8 * COUNT
    summary = flow.weights.summary()
    np.testing.assert_allclose(summary["flow/mean_weight"], expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        summary["flow/effective_sample_size"], expected.sum() ** 2 / (expected**2).sum(), rtol=1e-6
    )
    again = fl.SampleWeights.load("run/flow_weights.safetensors")
    assert torch.equal(again.weights, flow.weights.weights)
