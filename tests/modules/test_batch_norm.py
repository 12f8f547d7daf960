from copy import deepcopy

import pytest
import torch
from torch import nn

from flow_lightning.modules.batch_norm import batch_norm_layers, batch_norm_state, set_batch_norm


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_kind_of_batch_norm_is_found_at_any_depth(layer):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer(2), nn.LayerNorm(2)))
    assert list(batch_norm_layers(model)) == ["1.0"]
    assert {name.rpartition(".")[2] for name in batch_norm_state(model)} >= {"weight", "running_mean", "running_var"}


def test_a_state_is_put_back_and_nothing_else_changes():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = deepcopy(batch_norm_state(model))
    model(torch.randn(8, 3))
    with torch.no_grad():
        model[1].weight.fill_(2.0)
        model[0].weight.fill_(2.0)
    set_batch_norm(model, before)
    assert all(torch.equal(value, before[name]) for name, value in batch_norm_state(model).items())
    assert (model[0].weight == 2.0).all()
