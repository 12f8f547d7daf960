import random

import numpy as np
import pytest
import torch
from torch import nn

from flow_lightning.scoring.evaluation import evaluation


def test_evaluation_restores_modes_and_streams_and_records_no_graph():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with evaluation(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.rand(3, 2)).requires_grad
        torch.rand(5), np.random.rand(5), random.random()
    assert [module.training for module in model.modules()] == modes
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_evaluation_restores_after_an_error():
    model = nn.Dropout()
    with pytest.raises(KeyError), evaluation(model):
        raise KeyError
    assert model.training and torch.is_grad_enabled()
