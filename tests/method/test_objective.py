import numpy as np
import pytest
import scipy.stats
import torch

from flow_lightning.method.objective import draw, uniform, weighted_loss


@pytest.mark.parametrize("reduction", ["batch", "weights"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_weights_one_is_the_plain_loss_to_the_last_bit(reduction, size, dtype):
    losses = torch.rand(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    ones = torch.ones(size, dtype=dtype)
    assert torch.equal(weighted_loss(losses, ones, reduction), losses.mean())
    assert torch.equal(weighted_loss(losses, None, reduction), losses.mean())


def test_both_reductions_match_numpy():
    rng = np.random.default_rng(0)
    losses, weights = rng.random(31), rng.random(31)
    tensors = torch.from_numpy(losses), torch.from_numpy(weights)
    assert weighted_loss(*tensors).item() == pytest.approx((weights * losses).sum() / 31)
    assert weighted_loss(*tensors, reduction="weights").item() == pytest.approx(np.average(losses, weights=weights))


def test_a_batch_whose_weights_all_vanish_is_zero_and_not_nan():
    losses = torch.ones(3, requires_grad=True)
    loss = weighted_loss(losses, torch.zeros(3), "weights")
    loss.backward()
    assert loss.item() == 0 and torch.equal(losses.grad, torch.zeros(3))


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="one weight for each loss"):
        weighted_loss(torch.ones(3), torch.ones(3, 1))
    with pytest.raises(ValueError, match="expected 'batch'"):
        weighted_loss(torch.ones(3), None, "sum")  # type: ignore[arg-type]


def test_samples_are_drawn_as_often_as_they_weigh():
    """20,000 seeds; each share within 5 of its own standard errors, sqrt(w (1 - w) / n)."""
    weights, index = torch.tensor([1.0, 0.7, 0.3, 0.01, 0.0]), torch.tensor([3, 0, 99, 7, 1])
    counts, n = torch.zeros(5), 20_000
    for seed in range(n):
        counts[draw(weights, index, hash((seed, 0)))] += 1
    error = (counts / n - weights).abs()
    assert (error <= 5 * (weights * (1 - weights) / n).sqrt()).all()
    assert counts[0] == n and counts[4] == 0


@pytest.mark.parametrize("seed", [0, 1234567, 2**63 - 1, -(2**63), -5])
def test_random_numbers_are_those_of_splitmix64(seed):
    """Against Python's integers; the first outputs for seed 1234567 are those of the generator's published test."""
    state, expected, mask = seed % 2**64, [], 2**64 - 1
    for _ in range(1000):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    if seed == 1234567:
        assert expected[:2] == [6457827717110365317, 3203168211198807973]
    found = uniform(torch.arange(1000), seed)
    assert found.dtype == torch.float32
    assert found.double().tolist() == [(z >> 40) / 2**24 for z in expected]
    assert scipy.stats.kstest(found.double().numpy(), "uniform").pvalue > 1e-4


def test_a_draw_does_not_depend_on_batch_and_place():
    weights, index = torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.arange(64)
    drawn = set(draw(weights, index, 5).tolist())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = order.split([10, 1, 53])
    assert {i for part in parts for i in part[draw(weights[part], part, 5)].tolist()} == drawn
    assert set(draw(weights, index, 6).tolist()) != drawn
