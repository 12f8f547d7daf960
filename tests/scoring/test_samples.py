import torch
from torch.utils.data import DataLoader, TensorDataset

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.samplers import FixedBatches
from flow_lightning.scoring.samples import cut_batches, loader_like, read_once

DATA = IndexedDataset(TensorDataset(torch.arange(11.0)))


def test_batches_cover_the_data_set_in_order():
    batches = cut_batches(DataLoader(DATA, batch_size=4, shuffle=True))
    assert [list(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    fixed = FixedBatches([[2, 1], [0]])
    assert cut_batches(DataLoader(DATA, batch_sampler=fixed)) == [[2, 1], [0]]


def test_the_loader_that_is_copied_is_not_iterated():
    class Watched(DataLoader):
        def __iter__(self):
            raise AssertionError("iterated")

    watched = Watched(DATA, batch_size=5, shuffle=True, num_workers=2, persistent_workers=True)
    copy = loader_like(watched, cut_batches(watched))
    assert (copy.num_workers, copy.persistent_workers, len(copy)) == (2, False, 3)
    assert torch.cat([batch.index for batch in copy]).tolist() == list(range(11))


def test_samples_are_read_once_in_several_passes():
    class Counted(TensorDataset):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    reads, data = [], Counted(torch.arange(5.0))
    again = read_once(DataLoader(data, batch_size=2, shuffle=True))
    passes = [torch.cat([batch[0] for batch in again]).tolist() for _ in range(3)]
    assert passes == [[0, 1, 2, 3, 4]] * 3 and reads == [0, 1, 2, 3, 4]


def test_a_collate_function_that_takes_fields_out_finds_them_in_the_next_pass():
    class Records(TensorDataset):
        def __getitem__(self, index):
            return {"value": self.tensors[0][index], "name": str(index)}

    def values(samples):
        return [sample.pop("value").item() for sample in samples]

    again = read_once(DataLoader(Records(torch.arange(3.0)), batch_size=3, collate_fn=values))
    assert [list(again) for _ in range(2)] == [[[0.0, 1.0, 2.0]]] * 2
