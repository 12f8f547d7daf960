import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from flow_lightning.method.losses import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_minus_the_log_probability_in_at_least_float32(dtype):
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(9) % 5
    losses = cross_entropy(logits, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = -log_softmax(logits.double().numpy(), axis=1)[np.arange(9), targets.numpy()]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
