import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from sklearn.metrics import top_k_accuracy_score

from flow_lightning.measures.metrics import hardest, kl_divergences, mean, top_k_correct


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_accuracy_is_that_of_sklearn(k):
    logits, targets = torch.randn(101, 7), torch.randint(7, (101,))
    expected = top_k_accuracy_score(targets.numpy(), logits.numpy(), k=k, labels=range(7))
    assert mean(top_k_correct(logits, targets, k)) == pytest.approx(expected)


def test_more_guesses_than_classes_are_always_right_but_a_diverged_network_knows_nothing():
    targets, nothing = torch.tensor([0, 1, 2, 0]), torch.full((4, 3), torch.nan)
    assert top_k_correct(torch.randn(4, 3), targets, k=5).all()
    assert not top_k_correct(nothing, targets).any() and not top_k_correct(nothing, targets, k=5).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_is_that_of_scipy(dtype):
    reference, now = 5 * torch.randn(40, 9, dtype=dtype), 5 * torch.randn(40, 9, dtype=dtype)
    p, q = (x.double().softmax(1).numpy() for x in (reference, now))
    expected = rel_entr(p, q).sum(1)
    np.testing.assert_allclose(kl_divergences(reference, now).numpy(), expected, rtol=1e-4, atol=1e-6)
    assert mean(kl_divergences(reference.log_softmax(1), now)) == pytest.approx(expected.mean(), rel=1e-5)
    assert kl_divergences(reference, now).dtype == dtype


def test_kl_copes_with_impossible_classes_and_half_precision():
    reference = torch.tensor([[0.0, -torch.inf]])
    assert kl_divergences(reference, torch.zeros(1, 2)).item() == pytest.approx(np.log(2))
    assert kl_divergences(torch.zeros(1, 2).half(), torch.zeros(1, 2).half()).dtype == torch.float32


@pytest.mark.parametrize(("n", "fraction", "count"), [(1, 0.1, 1), (11, 0.1, 2), (30, 0.1, 3), (10, 1.0, 10)])
def test_hardest_are_the_highest_losses(n, fraction, count):
    losses = torch.rand(n)
    expected = sorted(np.argsort(losses.numpy())[-count:].tolist())
    assert hardest(losses, fraction).tolist() == expected
