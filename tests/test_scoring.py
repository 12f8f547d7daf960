import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flow_lightning.indexing import IndexedDataset
from flow_lightning.scoring import collect, evaluation, loader_like

DATA = IndexedDataset(TensorDataset(torch.arange(11.0)))


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


@pytest.mark.parametrize("indices", [range(11), range(1, 11, 3), range(11, 11)])
def test_collect_files_values_by_index(indices):
    loader = loader_like(DataLoader(DATA, batch_size=4, shuffle=True), indices)
    results = collect(loader, lambda batch: (batch.sample[0] * 2, batch.index), indices, length=11)
    if not len(indices):
        assert results == ()
        return
    expected = np.zeros(11)
    expected[list(indices)] = 2.0 * np.array(indices)
    np.testing.assert_array_equal(results[0].numpy(), expected)
    assert results[0].dtype == torch.float32 and results[1].dtype == torch.int64


def test_a_data_set_that_numbers_otherwise_is_refused():
    loader = DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="position in the training data set"):
        collect(loader, lambda batch: (batch.index,), range(11))


def test_the_loader_that_is_copied_is_not_iterated():
    class Watched(DataLoader):
        def __iter__(self):
            raise AssertionError("iterated")

    watched = Watched(DATA, batch_size=5, shuffle=True, num_workers=2, persistent_workers=True)
    copy = loader_like(watched, range(11))
    assert (copy.num_workers, copy.persistent_workers, copy.batch_size) == (2, False, 5)
    assert torch.cat([batch.index for batch in copy]).tolist() == list(range(11))
