import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split

from flow_lightning.data.indexing import IndexedDataset, IndexedSample, batch_index, check_indices, select

BASE = TensorDataset(torch.arange(10.0), torch.arange(10))


@pytest.mark.parametrize(
    "dataset",
    [
        BASE,
        Subset(BASE, [3, 1, 4]),
        ConcatDataset([BASE, Subset(BASE, [7])]),
        random_split(BASE, [6, 4])[1],
        [{"x": float(i)} for i in range(5)],
    ],
)
def test_every_kind_of_map_style_data_set_gets_positions(dataset):
    batches = list(DataLoader(IndexedDataset(dataset), batch_size=3, shuffle=True))
    found = torch.cat([batch_index(batch) for batch in batches])
    assert sorted(found.tolist()) == list(range(len(dataset)))
    for batch in batches:
        for row, index in enumerate(batch_index(batch).tolist()):
            value = batch["x"][row] if isinstance(batch, dict) else batch.sample[0][row]
            original = dataset[index]["x"] if isinstance(batch, dict) else dataset[index][0]
            assert value == original


def test_a_negative_position_counts_from_the_end_and_a_list_of_positions_gives_their_samples():
    assert IndexedDataset(BASE)[-1].index == 9
    assert IndexedDataset("abc")[[2, 0]] == [IndexedSample("c", 2), IndexedSample("a", 0)]


@pytest.mark.parametrize("batch", [{"image": torch.ones(2)}, [torch.ones(2), torch.ones(2)], (1, 2), torch.ones(3)])
def test_a_batch_without_index_is_an_error_that_names_the_fix(batch):
    with pytest.raises(KeyError, match="IndexedDataset"):
        batch_index(batch)


def test_an_iterable_data_set_is_an_error_that_names_what_to_do():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(3)

    with pytest.raises(TypeError, match=r"Stream is not a map-style .*`list\(data\)`.*from_generator"):
        IndexedDataset(Stream())


def test_indices_that_are_no_positions_are_an_error():
    check_indices(torch.tensor([1, 3]), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="position in the training data set"):
        check_indices(torch.tensor([1, 1]), torch.tensor([1, 3]))


def test_a_tuple_sample_is_collated_with_its_names_and_unpacks():
    batch = (x, y), index = next(iter(DataLoader(IndexedDataset(BASE), batch_size=2)))
    assert isinstance(batch, IndexedSample) and torch.equal(batch.index, torch.tensor([0, 1]))
    assert x.shape == y.shape == index.shape == (2,)


def test_select_takes_samples_at_any_depth():
    batch = IndexedSample([torch.arange(6).reshape(3, 2), {"name": ["a", "b", "c"]}], torch.tensor([7, 8, 9]))
    taken = select(batch, torch.tensor([2, 0]), 3)
    assert type(taken) is IndexedSample and taken.index.tolist() == [9, 7]
    assert taken.sample[0].tolist() == [[4, 5], [0, 1]] and taken.sample[1] == {"name": ["c", "a"]}


@pytest.mark.parametrize("part", [torch.zeros(()), torch.zeros(2, 2), "abc"])
def test_select_refuses_what_is_not_split_by_sample(part):
    with pytest.raises(TypeError, match="reduction='batch'"):
        select({"x": part, "index": torch.arange(3)}, torch.tensor([0]), 3)
