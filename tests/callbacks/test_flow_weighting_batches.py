"""Samples from anywhere: whatever a project's loaders are, its own step is as one with the weights in its batches."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import flow_lightning as fl
from tests.unchanged import Classifier, data, fit, weights

DATA = data()
#: Samples `(x, y, w)`; only the step by hand looks at w.
SAMPLES = TensorDataset(*DATA.tensors, weights())
COLUMNS = dict(zip("xyw", SAMPLES.tensors))


@dataclasses.dataclass
class Inputs:
    x: Tensor


@dataclasses.dataclass
class Record:
    """A dataclass in a dataclass."""

    inputs: Inputs
    y: Tensor
    w: Tensor


def stack(samples: list[Any]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*samples)]


def as_record(samples: list[Any]) -> Record:
    x, y, w = stack(samples)
    return Record(Inputs(x), y, w)


def as_nested(samples: list[Any]) -> dict[str, Any]:
    x, y, w = stack(samples)
    return {"inputs": {"x": [x], "texts": ["a text"] * len(y)}, "targets": ({"y": y}, w)}


def parts_of(batch: Any) -> Any:
    if isinstance(batch, Record):
        return batch.inputs.x, batch.y, batch.w
    if isinstance(batch, dict) and "inputs" in batch:
        return batch["inputs"]["x"][0], batch["targets"][0]["y"], batch["targets"][1]
    return (batch["x"], batch["y"], batch["w"]) if isinstance(batch, dict) else batch


class Own(Classifier):
    """Knows nothing of weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = parts_of(batch)
        return F.cross_entropy(self.net(x), y)


class ByHand(Classifier):
    """Weighs by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, w = parts_of(batch)
        return (w * F.cross_entropy(self.net(x), y, reduction="none")).mean()


class Buckets(Sampler):
    """Batches of a user's own, each of another size."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        order = torch.randperm(23, generator=torch.Generator().manual_seed(self.epoch))
        yield from (part.tolist() for part in order.split([2, 7, 4, 2, 8]))

    def __len__(self) -> int:
        return 5


class AtOnce(list[Any]):
    """Reads the samples of a batch together, as torch lets it."""

    def __getitems__(self, positions: list[int]) -> list[Any]:
        return [self[position] for position in positions]


class Special(DataLoader):
    """A project's own class."""

    def __init__(self, *args: Any, tag: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class Module(LightningDataModule):
    """A project's own data module."""

    def train_dataloader(self) -> Any:
        return shuffled(num_workers=1, persistent_workers=True)


def shuffled(dataset: Any = SAMPLES, kind: Any = DataLoader, **settings: Any) -> Any:
    return kind(dataset, 5, shuffle=True, generator=torch.Generator().manual_seed(3), **settings)


LATER = Subset(TensorDataset(*(torch.cat([part[:5], part]) for part in SAMPLES.tensors)), range(5, 28))
HALVES = ConcatDataset([Subset(SAMPLES, range(9)), Subset(SAMPLES, range(9, 23))])
LOADERS = {
    "nested": partial(shuffled, collate_fn=as_nested),
    "dataclasses": partial(shuffled, collate_fn=as_record),
    "Subset": partial(shuffled, LATER),
    "ConcatDataset": partial(shuffled, HALVES),
    "datasets.Dataset": lambda: shuffled(
        datasets.Dataset.from_dict({name: column.tolist() for name, column in COLUMNS.items()}).with_format("torch")
    ),
    "__getitems__": lambda: shuffled(AtOnce(dict(zip("xyw", sample)) for sample in SAMPLES)),
    "own batches": lambda: DataLoader(SAMPLES, batch_sampler=Buckets()),
    "own class": partial(shuffled, kind=Special, tag="mine"),
    "sampler": lambda: DataLoader(
        SAMPLES, 5, sampler=WeightedRandomSampler(torch.arange(1.0, 24), 40, generator=torch.Generator().manual_seed(3))
    ),
    "data module": Module,
    "one batch": lambda: DataLoader(SAMPLES, 64, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "reload": partial(shuffled, num_workers=1, persistent_workers=True),
    "drop_last": partial(shuffled, drop_last=True),
    "bf16-true": shuffled,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "reload": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
    "drop_last": {"accumulate_grad_batches": 3},
    "bf16-true": {"precision": "bf16-true"},
}


def assert_alike(own: Classifier, by_hand: Classifier, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(own.state_dict(), by_hand.state_dict(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_of_all_kinds_do_as_with_weights_by_hand(name: str) -> None:
    own, by_hand = Own(), ByHand()
    for module, callbacks in ((own, [fl.FlowWeightingCallback()]), (by_hand, [])):
        fit(module, None, *callbacks, loader=LOADERS[name](), **SETTINGS.get(name, {}))
    assert_alike(own, by_hand, **({"rtol": 2e-2, "atol": 2e-2} if name == "bf16-true" else {}))


def test_a_hook_that_makes_a_new_loader_each_epoch_is_followed() -> None:
    own, by_hand = Own(), ByHand()
    for module, callbacks in ((own, [fl.FlowWeightingCallback()]), (by_hand, [])):
        module.train_dataloader = shuffled
        fit(module, None, *callbacks, loader=None, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    assert_alike(own, by_hand)


class Stream(IterableDataset):
    """Samples without positions."""

    def __iter__(self) -> Iterator[Any]:
        return iter(SAMPLES)


class Puller(Classifier):
    """Draws its batches by itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        (x, y, _), _, _ = next(dataloader_iter)
        return F.cross_entropy(self.net(x), y)


def in_order_of_size(samples: list[Any]) -> list[Tensor]:
    return stack(sorted(samples, key=lambda sample: float(sample[0].sum())))


@pytest.mark.parametrize(
    ("kind", "loader", "error", "message"),
    [
        (
            Own,
            lambda: DataLoader(Stream(), 5),
            TypeError,
            r"Stream is not a map-style .*Load them into .*`list\(data\)`",
        ),
        (Puller, shuffled, TypeError, r"takes a dataloader_iter .*Let it take `batch`"),
        (Own, partial(shuffled, collate_fn=in_order_of_size), ValueError, "row is not its place in the batch"),
    ],
)
def test_samples_that_cannot_be_known_are_refused_and_nothing_trained(
    kind: Any, loader: Any, error: Any, message: str
) -> None:
    module, before = kind(), kind().state_dict()
    with pytest.raises(error, match=message):
        fit(module, None, fl.FlowWeightingCallback(), loader=loader())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
