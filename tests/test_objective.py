import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow_lightning.objective import draw, weighted_loss


@pytest.mark.parametrize("reduction", ["batch", "weights"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_weights_one_is_the_plain_loss_to_the_last_bit(reduction, size, dtype):
    losses = torch.rand(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    ones = torch.ones(size, dtype=dtype)
    assert torch.equal(weighted_loss(losses, ones, reduction), losses.mean())
    assert torch.equal(weighted_loss(losses, None, reduction), losses.mean())


def test_no_weights_is_torchs_own_cross_entropy():
    logits, targets = torch.randn(33, 5), torch.randint(5, (33,))
    losses = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(weighted_loss(losses), F.cross_entropy(logits, targets))


def test_both_reductions_match_numpy():
    rng = np.random.default_rng(0)
    losses, weights = rng.random(31), rng.random(31)
    tensors = torch.from_numpy(losses), torch.from_numpy(weights)
    assert weighted_loss(*tensors).item() == pytest.approx((weights * losses).sum() / 31)
    assert weighted_loss(*tensors, reduction="weights").item() == pytest.approx(np.average(losses, weights=weights))


def test_gradient_of_each_loss_is_its_weight_over_the_denominator():
    losses = torch.rand(4, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0])
    weighted_loss(losses, weights).backward()
    torch.testing.assert_close(losses.grad, weights / 4)


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


def test_drawn_gradients_have_the_weighted_gradient_as_their_mean():
    """20,000 draws; each mean within 5 of its own standard errors, sqrt(w (1 - w) / n)."""
    weights = torch.tensor([1.0, 0.7, 0.3, 0.01, 0.0])
    generator, counts, n = torch.Generator().manual_seed(0), torch.zeros(5), 20_000
    for _ in range(n):
        counts[draw(weights, generator)] += 1
    error = (counts / n - weights).abs()
    assert (error <= 5 * (weights * (1 - weights) / n).sqrt()).all()
    assert counts[0] == n and counts[4] == 0
