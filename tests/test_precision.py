"""Weights are those of float32 in every precision, and loss scaling does not lose small ones."""

import numpy as np
import pytest
import torch

import flow_lightning as fl
from flow_lightning.method.losses import cross_entropy
from tests.examples import fit
from tests.images import PictureData, tiny_module


class Relabelled(PictureData):
    """Labels that have nothing to do with the pictures: losses near log 3, as of a task that is hard."""

    def __init__(self):
        super().__init__(n=60)
        targets = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
        samples = [{**self.train_set[i], "target": target} for i, target in enumerate(targets)]
        self.train_set = fl.IndexedDataset(samples)


def weights_in(precision: str) -> fl.SampleWeights:
    flow = fl.FlowWeightingCallback()
    module = tiny_module(batch_norm="frozen")
    fit(fl.LinearProbeCallback(), flow, module=module, data=Relabelled(), precision=precision)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    return flow.weights


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_weights_are_those_of_float32(precision):
    """The rule is exact to float32; the losses are off by what the precision does to the features, 2^-8 of them."""
    found, exact = weights_in(precision), weights_in("32-true")
    losses = found.losses.double().numpy()
    assert found.weights.dtype == found.losses.dtype == torch.float32
    assert found.temperature == pytest.approx(np.median(losses), rel=1e-6)
    np.testing.assert_allclose(found.weights.numpy(), np.exp(-losses / np.median(losses)), rtol=1e-6)
    tolerance = {"32-true": 0.0, "64-true": 1e-3}.get(precision, 0.02)
    np.testing.assert_allclose(found.weights.numpy(), exact.weights.numpy(), atol=tolerance)


SCALE = 2.0**16  # where torch's GradScaler starts


def gradient(weights, dtype, reduction="batch"):
    """Scaled gradient of a linear classifier as 16-mixed training computes it, unscaled afterwards."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(len(weights), 8, generator=generator), torch.arange(len(weights)) % 3
    layer = torch.nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 8, generator=generator))
        layer.bias.zero_()
    if dtype == torch.float64:
        layer, x = layer.double(), x.double()
    with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
        losses = cross_entropy(layer(x), y) if dtype == torch.float16 else exact_cross_entropy(layer(x), y)
        loss = fl.weighted_loss(losses, weights.to(losses.dtype), reduction)
    (SCALE * loss).backward()
    return layer.weight.grad.double() / SCALE


def exact_cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def test_a_small_weight_among_large_ones_keeps_its_part_of_the_gradient():
    """1e-8 of a sample: its own gradient, scaled, is above the smallest float16, 6e-8, at batches of 64."""
    weights = torch.full((64,), 1e-8)
    found, exact = gradient(weights, torch.float16), gradient(weights, torch.float64)
    assert exact.norm() > 0
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03 * exact.abs().max().item())


def test_with_the_weights_as_denominator_their_size_does_not_matter():
    small, large = (gradient(torch.full((64,), w), torch.float16, "weights") for w in (1e-30, 1.0))
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-4)


def test_below_float16_a_step_of_nothing_but_tiny_weights_is_no_step():
    """What happens at the limit: 1e-12 of a gradient underflows to 0, as a step of that size would do anyway."""
    assert gradient(torch.full((64,), 1e-12), torch.float64).abs().max() > 0
    assert gradient(torch.full((64,), 1e-12), torch.float16).abs().max() == 0
    assert gradient(torch.full((64,), 1e-10), torch.float16).abs().max() > 0
