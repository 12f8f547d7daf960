"""What a training step leaves behind when it runs for scoring: nothing."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from tests.unchanged import Classifier, data, fit


class Meter:
    """Counts, as meters of older projects do."""

    def __init__(self) -> None:
        self.count, self.values, self.array = 0, [0], np.zeros(2)

    def update(self) -> None:
        self.count += 1
        self.values.append(self.count)
        self.array += 1


class Metered(Classifier):
    """Has meters, counters and metrics that are no parts of the module, and a tensor that cannot be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.meters, self.counter, self.parts = (Meter(),), Counter(steps=0), {"norm": nn.BatchNorm1d(4)}
        self.expanded = torch.zeros(1).expand(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.meters[0].update()
        self.counter["steps"] += 1
        self.parts["norm"](batch[0])
        return super().training_step(batch, batch_idx)


def test_scoring_and_proof_leave_nothing_in_what_a_module_holds() -> None:
    plain, weighted = Metered(), Metered()
    fit(plain, data())
    fit(weighted, data(), fl.FlowWeightingCallback())
    assert weighted.meters[0].values == plain.meters[0].values
    assert weighted.counter == plain.counter
    np.testing.assert_array_equal(weighted.meters[0].array, plain.meters[0].array)
    torch.testing.assert_close(weighted.parts["norm"].state_dict(), plain.parts["norm"].state_dict())


def test_losses_that_are_rounding_alone_are_named_as_such() -> None:
    """A product of one row is rounded otherwise than one of two."""

    class Fitted(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    module, x = Fitted(), torch.randn(8, 64)
    with torch.no_grad():
        exact = module.double().net(x.double()).float()
    with pytest.raises(
        ValueError, match=r"Fitted.training_step the losses .* at most \de-1\d, which is rounding alone"
    ):
        fit(module.float(), None, fl.FlowWeightingCallback(), loader=DataLoader(TensorDataset(x, exact), 2))
