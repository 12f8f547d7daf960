"""What Lightning gives only by private names, or not whole."""

import random

import numpy as np
import pytest
import torch

from flow_lightning.lightning_internals import isolate_rng


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_are_put_back_after_an_error_too(fails: bool) -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    try:
        with isolate_rng():
            draws()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert draws() == expected
