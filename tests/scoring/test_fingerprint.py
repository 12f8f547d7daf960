import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.scoring.fingerprint import (
    inspect_dataset,
    join_fingerprints,
    model_fingerprints,
    sample_fingerprint,
)


def dataset_fingerprint(dataset):
    return inspect_dataset(dataset)[0]


def model_fingerprint(state, exclude=()):
    return join_fingerprints(model_fingerprints(state), exclude)


def data(n=40, shift=0.0):
    return TensorDataset(torch.arange(n) + shift, torch.arange(n) % 3)


class Doubled(TensorDataset):
    def __getitem__(self, index):
        return tuple(2 * value for value in super().__getitem__(index))


def test_equal_data_sets_have_equal_fingerprints():
    assert dataset_fingerprint(data()) == dataset_fingerprint(data())
    assert dataset_fingerprint(IndexedDataset(data())) == dataset_fingerprint(IndexedDataset(data()))


@pytest.mark.parametrize(
    "other", [data(41), data(shift=1.0), Subset(data(), [1, 0, *range(2, 40)]), Doubled(*data().tensors)]
)
def test_length_content_order_and_transforms_count(other):
    assert dataset_fingerprint(other) != dataset_fingerprint(data())


class Labelled(TensorDataset):
    """Zeros with targets of any kind."""

    def __init__(self, targets):
        super().__init__(torch.zeros(len(targets)))
        self.targets = targets


@pytest.mark.parametrize(
    "targets",
    [
        lambda value: [0] * 700 + [value] + [0] * 299,
        lambda value: [{"boxes": torch.tensor([box]), "label": "a"} for box in (1, value)],
        lambda value: [[0], [1, value]],
    ],
)
def test_every_target_counts_by_its_content(targets):
    """Numbers, dictionaries, or lists of different lengths."""
    for wrap in (lambda dataset: dataset, IndexedDataset, lambda dataset: Subset(dataset, range(1, len(dataset)))):
        same, again, other = (dataset_fingerprint(wrap(Labelled(targets(value)))) for value in (2, 2, 3))
        assert same == again != other


def test_models_differ_by_any_parameter_or_buffer():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = model_fingerprint(model.state_dict())
    assert before == model_fingerprint({name: value.clone() for name, value in model.state_dict().items()})
    for name in ("0.weight", "1.running_mean"):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name].view(-1)[0] += 1e-3
        assert model_fingerprint(state) != before
        assert model_fingerprint(state, (name,)) == model_fingerprint(model.state_dict(), (name,))


def test_a_large_tensor_is_sampled_from_end_to_end():
    big, other = torch.zeros(10**6), torch.zeros(10**6)
    other[-1] = 1
    assert model_fingerprint({"w": big}) != model_fingerprint({"w": other})


def test_samples_of_all_kinds_can_be_hashed():
    sample = {"a": torch.ones(2, dtype=torch.bfloat16), "b": [1, "x", None, (2.0, b"y")], "c": object()}
    assert sample_fingerprint(sample) == sample_fingerprint({**sample, "c": object()})
    assert sample_fingerprint(sample) != sample_fingerprint({**sample, "b": [2, "x", None, (2.0, b"y")]})
    assert sample_fingerprint([[1], [2]]) != sample_fingerprint([[1, 2]])


class Flipped(TensorDataset):
    """Each second reading differs, by chance."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] * (1 if torch.rand(()) < 0.5 else -1)


def test_each_sample_is_read_at_most_twice():
    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    counted = Counted(torch.zeros(1000))
    inspect_dataset(counted)
    assert counted.reads == 32 + 16


def test_random_transforms_are_noticed_and_have_the_same_fingerprint_each_time():
    found = set()
    for seed in range(10):
        torch.manual_seed(seed)
        found.add(inspect_dataset(Flipped(torch.ones(20))))
    assert [is_random for _, is_random in found] == [True]
    assert not inspect_dataset(data())[1] and not inspect_dataset([])[1]
