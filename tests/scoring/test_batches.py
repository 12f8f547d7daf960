import random

import numpy as np
import pytest
import torch
from flow_lightning.scoring.batches import FixedBatches, evaluation, loader_like, score_batch, scoring_batches
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flow_lightning.data.indexing import IndexedDataset

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


def test_batches_cover_the_data_set_in_order():
    batches = scoring_batches(DataLoader(DATA, batch_size=4, shuffle=True))
    assert [list(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    fixed = FixedBatches([[2, 1], [0]])
    assert scoring_batches(DataLoader(DATA, batch_sampler=fixed)) == [[2, 1], [0]]


def test_a_batch_gives_its_index_and_values():
    (batch,) = loader_like(DataLoader(DATA, batch_size=4, shuffle=True), [range(5, 8)])
    index, doubled = score_batch(batch, range(5, 8), lambda batch: (batch.sample[0] * 2,))
    assert index.tolist() == [5, 6, 7] and doubled.tolist() == [10.0, 12.0, 14.0]


def test_a_data_set_that_numbers_otherwise_is_refused():
    batch = next(iter(DataLoader(DATA, batch_size=4)))
    with pytest.raises(ValueError, match="position in the training data set"):
        score_batch(batch, range(1, 5), lambda batch: (batch.index,))


def test_the_loader_that_is_copied_is_not_iterated():
    class Watched(DataLoader):
        def __iter__(self):
            raise AssertionError("iterated")

    watched = Watched(DATA, batch_size=5, shuffle=True, num_workers=2, persistent_workers=True)
    copy = loader_like(watched, scoring_batches(watched))
    assert (copy.num_workers, copy.persistent_workers, len(copy)) == (2, False, 3)
    assert torch.cat([batch.index for batch in copy]).tolist() == list(range(11))
