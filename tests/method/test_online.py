"""Online weights against closed formulas, by autograd and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow_lightning.method.online import adaptive, entropy_gate, probability, rate_factor, smallest


@pytest.mark.parametrize("power", [0.3, 0.7, 1.0])
def test_weighted_cross_entropy_has_the_gradient_of_generalised_cross_entropy(power):
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.arange(9) % 5
    p = logits.softmax(1)[torch.arange(9), targets]
    (expected,) = torch.autograd.grad(((1 - p**power) / power).mean(), logits)
    losses = F.cross_entropy(logits, targets, reduction="none")
    (found,) = torch.autograd.grad((probability(losses.detach(), power) * losses).mean(), logits)
    torch.testing.assert_close(found, expected)


def test_adaptive_weights_are_exponential_down_to_a_floor():
    losses = np.array([0.1, 0.4, 1.0, 2.0, 30.0])
    found = adaptive(torch.tensor(losses), floor=0.05)
    np.testing.assert_allclose(found, np.maximum(np.exp(-losses / 1.0), 0.05))
    assert adaptive(torch.zeros(3)).tolist() == [1, 1, 1], "a model that is right in all"


@pytest.mark.parametrize(("share", "kept"), [(0.1, 1), (0.5, 4), (0.75, 6), (1.0, 8)])
def test_the_smallest_losses_are_kept(share, kept):
    losses = torch.tensor([5.0, 1.0, 4.0, 8.0, 2.0, 7.0, 3.0, 6.0])
    assert smallest(losses, share).tolist() == [float(loss <= kept) for loss in losses]


def test_of_equal_losses_as_many_are_kept():
    assert smallest(torch.ones(10), 0.3).sum() == 3


@pytest.mark.parametrize("classes", [3, 50])
def test_the_gate_is_the_entropy_of_the_largest_probabilities_by_scipy(classes):
    from scipy.stats import entropy

    logits = np.random.default_rng(0).normal(size=(6, classes), scale=3)
    largest = np.sort(np.exp(logits), axis=1)[:, -20:]
    expected = entropy(largest, axis=1) / np.log(min(20, classes))
    np.testing.assert_allclose(entropy_gate(torch.tensor(logits)), expected, rtol=1e-5)
    np.testing.assert_allclose(entropy_gate(torch.tensor(logits), 2.0), expected**2, rtol=1e-5)


def test_a_sure_model_shuts_the_gate():
    assert entropy_gate(torch.tensor([[1000.0, 0.0, 0.0]])).item() == 0


def test_the_rate_grows_with_the_root_of_the_falling_loss_up_to_its_bound():
    assert rate_factor(2.0, 2.0) == 1
    assert rate_factor(8.0, 2.0) == 0.5
    assert rate_factor(0.0, 2.0, most=3.0) == 3
