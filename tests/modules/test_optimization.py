"""Optimizer and schedule against the formula of the cosine."""

import numpy as np
import pytest
import torch

import flow_lightning as fl
from tests.examples import make_trainer
from tests.images import PictureData


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 0.0, [0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8)]),
        ("constant", 0.0, [1.0] * 8),
        ("cosine", 0.25, [0.5, 1.0] + [0.5 * (1 + np.cos(np.pi * k / 6)) for k in range(6)]),
    ],
)
def test_the_learning_rate_follows_the_schedule_step_by_step(schedule, warmup, expected):
    rates = []

    class Recorded(fl.ImageClassificationModule):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    torch.manual_seed(0)
    module = Recorded("test_resnet.r160_in1k", 3, pretrained=False, learning_rate=0.1, schedule=schedule, warmup=warmup)
    make_trainer(max_epochs=2).fit(module, datamodule=PictureData())
    np.testing.assert_allclose(rates, 0.1 * np.array(expected), rtol=1e-6)
