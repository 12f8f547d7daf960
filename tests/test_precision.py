"""Weights are those of float32 in every precision, and loss scaling does not lose small ones."""

from functools import cache

import numpy as np
import pytest
import torch

import flow_lightning as fl
from flow_lightning.callbacks.step_denominator import StepDenominator
from flow_lightning.contract import BatchLosses
from flow_lightning.method.losses import cross_entropy
from flow_lightning.method.objective import denominator
from tests.examples import fit, make_trainer, slow
from tests.images import PictureData, tiny_module


@cache
def weights_in(precision: str) -> fl.SampleWeights:
    """Fit labels that have nothing to do with the pictures: losses near log 3, as of a task that is hard."""
    flow, module, data = fl.FlowWeightingCallback(), tiny_module(batch_norm="frozen"), PictureData(n=60)
    targets = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    data.train_set = fl.IndexedDataset([{**data.train_set[i], "target": target} for i, target in enumerate(targets)])
    fit(fl.LinearProbeCallback(), flow, module=module, data=data, precision=precision)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    return flow.weights


@pytest.mark.parametrize("precision", ["32-true", slow("64-true"), "bf16-mixed", slow("bf16-true"), "16-mixed"])
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


def gradient(weight, dtype, reduction="batch", parts=1):
    """Unscaled gradient of a linear classifier: of some micro-batches, as 16-mixed training adds them up."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.arange(64) % 3
    layer = torch.nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 8, generator=generator))
        layer.bias.zero_()
    half = dtype == torch.float16
    if not half:
        layer, x = layer.double(), x.double()
    trainer, step, module = make_trainer(accumulate_grad_batches=parts), StepDenominator(), fl.WeightedLossModule()
    for rows in torch.arange(64).split(64 // parts):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            losses = cross_entropy(layer(x[rows]), y[rows])
        weights = torch.full((len(rows),), weight, dtype=losses.dtype)
        module.batch_losses = BatchLosses(None, losses, denominator(losses, weights, reduction))
        loss = SCALE * fl.weighted_loss(losses, weights, reduction) / parts  # as Lightning does
        step.on_before_backward(trainer, module, loss)
        loss.backward()
    step.on_before_optimizer_step(trainer, module, torch.optim.SGD(layer.parameters()))
    return layer.weight.grad.double() / SCALE


@pytest.mark.parametrize(("reduction", "weight"), [("batch", 1.0), ("batch", 1e-6), ("weights", 1e-10)])
@pytest.mark.parametrize("parts", [1, 4, 32])
def test_half_precision_loses_no_more_than_in_one_batch(reduction, weight, parts):
    found, exact = (gradient(weight, dtype, reduction, parts) for dtype in (torch.float16, torch.float64))
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_a_small_weight_among_large_ones_keeps_its_part_of_the_gradient():
    """1e-8 of a sample: its own gradient, scaled, is above the smallest float16, 6e-8, at batches of 64."""
    found, exact = gradient(1e-8, torch.float16), gradient(1e-8, torch.float64)
    assert exact.norm() > 0
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03 * exact.abs().max().item())


def test_with_the_weights_as_denominator_their_size_does_not_matter():
    small, large = (gradient(w, torch.float16, "weights") for w in (1e-30, 1.0))
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-4)
