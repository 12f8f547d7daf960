"""A loader restored in mid-epoch serves what the unbroken one would have served next."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from flow_lightning.data.images import TransformedImages
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.packing import PackedBatches
from flow_lightning.data.samplers import LengthGroupedSampler
from flow_lightning.resume import ResumableDataLoader, ResumableSampler


def indices(samples):
    return torch.tensor([sample.index for sample in samples])


def loader_of(kind, n, batch_size, seed=3, **settings):
    data, lengths, sampler = range(n), [1 + i % 7 for i in range(n)], ResumableSampler(range(n), seed=seed)
    if kind == "packed":
        sampler = PackedBatches(lengths, batch_size + 7, seed=seed)
        return ResumableDataLoader(IndexedDataset(data), batch_size=None, sampler=sampler, collate_fn=indices)
    if kind == "grouped":
        sampler = LengthGroupedSampler(data, lengths, batch_size, seed=seed)
    return ResumableDataLoader(data, batch_size=batch_size, sampler=sampler, **settings)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@given(st.sampled_from(["plain", "grouped", "packed"]), st.integers(1, 40), st.integers(1, 9), st.integers(0, 40))
def test_it_goes_on_after_any_number_of_batches(kind, n, batch_size, served):
    whole = epoch_of(loader_of(kind, n, batch_size), 2)
    served %= len(whole)
    broken = loader_of(kind, n, batch_size)
    broken.sampler.set_epoch(2)
    iterator = iter(broken)
    for _ in range(served):
        next(iterator)
    state = broken.state_dict()
    resumed = loader_of(kind, n, batch_size)
    resumed.load_state_dict(state)
    assert epoch_of(resumed, 2) == whole[served:]
    assert resumed.state_dict() == {"batches": 0, "epoch": 2}
    assert epoch_of(resumed, 3) == epoch_of(loader_of(kind, n, batch_size), 3)


def test_an_epoch_that_was_left_before_its_end_does_not_go_on_in_the_next():
    """A Trainer with limit_train_batches has served 3 of 5 batches when it ends the epoch."""
    loader = loader_of("plain", 20, 4)
    loader.load_state_dict({"batches": 3, "epoch": 0})
    assert epoch_of(loader, 1) == epoch_of(loader_of("plain", 20, 4), 1)
    assert loader.state_dict() == {"batches": 0, "epoch": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_from_the_beginning_of_the_epoch_and_workers_do_not_run_ahead_of_it(workers):
    loader = loader_of("plain", 24, 2, num_workers=workers)
    loader.load_state_dict({"batches": 3, "epoch": 0})
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.state_dict() == {"batches": 5, "epoch": 0}


@pytest.mark.parametrize("kind", ["plain", "grouped", "packed"])
def test_order_follows_seed_and_epoch(kind):
    def order(seed, epoch):
        loader = loader_of(kind, 100, 4, seed=seed)
        return [i for batch in epoch_of(loader, epoch) for i in batch]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (7, 0))}) == 3


def augmented(seed):
    pictures = [(Image.effect_noise((16, 16), 90).convert("RGB"), 0) for _ in range(3)]
    crop = v2.Compose([v2.RandomResizedCrop(8), v2.PILToTensor()])
    return IndexedDataset(TransformedImages(pictures, crop, seed))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_follows_seed_epoch_and_position_alone(workers):
    data = augmented(5)
    sampler = ResumableSampler(data, seed=1)
    loader = ResumableDataLoader(
        data, batch_size=1, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )

    def pictures(epoch):
        sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # the global stream does not matter
        return {int(batch["index"]): batch["image"] for batch in loader}

    first, second, again = pictures(0), pictures(1), pictures(0)
    assert all(torch.equal(first[i], again[i]) for i in range(3))
    assert not any(torch.equal(first[i], second[i]) for i in range(3))
    before = torch.get_rng_state()
    data[0]
    assert torch.equal(torch.get_rng_state(), before)
