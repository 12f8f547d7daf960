import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from flow_lightning.method.losses import answer_change, cross_entropy, feature_change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_minus_the_log_probability_in_at_least_float32(dtype):
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(9) % 5
    losses = cross_entropy(logits, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = -log_softmax(logits.double().numpy(), axis=1)[np.arange(9), targets.numpy()]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_change_of_answers_is_the_divergence_of_scipy(dtype):
    before, now = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    p, q = (softmax(logits.double().numpy() / 1.7, axis=1) for logits in (before, now))
    np.testing.assert_allclose(answer_change(before, now, 1.7).numpy(), rel_entr(p, q).sum(1), rtol=1e-4, atol=1e-6)


def test_the_change_of_features_is_the_squared_norm_of_numpy():
    before, now = torch.randn(2, 9, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.norm((now - before).numpy().reshape(9, -1), axis=1) ** 2
    np.testing.assert_allclose(feature_change(before, now).numpy(), expected, rtol=1e-5)
