"""The samples to score: where they come from, how they are cut into batches, what they are known by.

In: Trainer and module. Out: `Samples`, made once per fit. Next: `score.py`.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flow_lightning.contract import data_contract
from flow_lightning.data.indexing import check_map_style, part_of
from flow_lightning.data.samplers import FixedBatches
from flow_lightning.lightning_internals import training_source
from flow_lightning.scoring.evaluation import evaluation
from flow_lightning.scoring.fingerprint import inspect_dataset

#: Samples that are read once stay in memory up to so many bytes.
_MEMORY = 2**30
_HOW = (
    "Give the Trainer a data module or module with `scoring_dataloader()` (the training samples, not augmented) or "
    "`train_dataloader()`, a DataLoader in `fit(model, loader)`, or FlowWeightingCallback(scoring_dataset=...)."
)


class Samples(NamedTuple):
    """The training samples as the frozen model sees them.

    Attributes:
        loader: Where data set, collate function and workers come from; it is never iterated.
        batches: Positions in the data set, by batch; the same on any number of processes.
        fingerprint: Hash of the data set, see `inspect_dataset`.
    """

    loader: DataLoader[Any]
    batches: Sequence[Sequence[int]]
    fingerprint: str

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def find_samples(trainer: Trainer, module: LightningModule, given: Any = None, key: str | int | None = None) -> Samples:
    """Find the training samples of a fit, and warn if they differ from one reading to the next.

    Args:
        trainer: Runs the fit.
        module: Is put into evaluation mode while samples are read: transforms may depend on it.
        given: A data set, or a DataLoader, in place of the fit's own scoring or training loader.
        key: Which of several training loaders.

    Raises:
        TypeError: If there is no DataLoader, or its data set is iterable-style.
        ValueError: If the data set is empty.
    """
    loader = given if isinstance(given, DataLoader) else training_loader(trainer, key)
    if given is not None and loader is not given:
        check_map_style(given)
        loader = loader_like(loader, _in_order(len(given), loader.batch_size), given)
    batches = cut_batches(loader)
    with evaluation(module):
        fingerprint, is_random = inspect_dataset(loader.dataset)
    if is_random:
        rank_zero_warn(
            "Two readings of a sample to score differ: its transforms are random, so the weights come from one random "
            "draw. Give FlowWeightingCallback(scoring_dataset=...) the same samples without augmentation, or the data "
            "module a `scoring_dataloader()`."
        )
    return Samples(loader, batches, fingerprint)


def check_trained_data(trainer: Trainer, module: LightningModule, samples: Samples, loader: Any) -> None:
    """Check that the fit trains on the data set that was scored, where both come from `train_dataloader()`.

    Raises:
        ValueError: If that gave other samples than before: of a random split without a seed, say.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or dataset is samples.loader.dataset or data_contract(trainer).scoring_dataloader is not None:
        return
    with evaluation(module):
        trained = inspect_dataset(dataset)[0]
        # A data set with random numbers of its own never reads the same: nothing is known of it.
        is_other = trained != samples.fingerprint and trained == inspect_dataset(dataset)[0]
    if is_other:
        raise ValueError(
            "train_dataloader() gives other samples than when they were scored, so the weights are not theirs. Make "
            "the data set once, in setup() or __init__, or give a random split its own seeded generator."
        )


def training_loader(trainer: Trainer, key: str | int | None = None) -> DataLoader[Any]:
    """Return `scoring_dataloader()` of data module or module, else the loader that the fit trains on."""
    scoring_dataloader = data_contract(trainer).scoring_dataloader
    loader = part_of(training_source(trainer), key) if scoring_dataloader is None else scoring_dataloader()
    if isinstance(loader, dict | list | tuple) and loader:
        first = next(iter(loader)) if isinstance(loader, dict) else 0
        raise TypeError(
            f"The fit has {len(loader)} training loaders. Name the one whose samples are to be weighted: "
            f"FlowWeightingCallback(loader={first!r})."
        )
    if not isinstance(loader, DataLoader):
        raise TypeError(f"FLOW needs the training samples as one DataLoader, but found {type(loader).__name__}. {_HOW}")
    return loader


def cut_batches(loader: DataLoader[Any]) -> Sequence[Sequence[int]]:
    """Cut the data set of a loader into batches: its fixed batches if it has some, else in order.

    They do not depend on the number of processes, so the values do not either. A data set that is empty, iterable-style
    or makes the batches itself is refused.
    """
    check_map_style(loader.dataset)
    length = len(loader.dataset)  # type: ignore[arg-type]
    if length == 0:
        raise ValueError("The data set is empty: there is nothing to score. Check its path and its split.")
    if isinstance(loader.batch_sampler, FixedBatches):
        return loader.batch_sampler.batches
    if loader.batch_sampler is None:
        raise TypeError(
            "The training loader has batch_size=None: its data set makes the batches, so samples have no index. Give "
            "the DataLoader single samples and a batch_size; flow_lightning.IndexedDataset numbers any map-style data."
        )
    return _in_order(length, loader.batch_size)


def _in_order(length: int, size: int | None) -> list[range]:
    size = size or 64
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def loader_like(
    loader: DataLoader[Any], batches: Sequence[Sequence[int]], dataset: Dataset[Any] | None = None
) -> DataLoader[Any]:
    """Make a loader over `batches`, in order, with the data set, collate function and workers of another loader.

    The other loader is never iterated, so neither its order nor its persistent workers notice.
    """
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        batch_sampler=FixedBatches(batches),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=getattr(loader, "multiprocessing_context", None) if loader.num_workers else None,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        generator=torch.Generator().manual_seed(0),
    )


def read_once(loader: DataLoader[Any], dataset: Any = None) -> DataLoader[Any]:
    """Make a loader for several passes over the samples of another one, or of a data set in its place.

    They stay in memory once they are read, up to 1 GiB. The processes of a loader with workers read them in each pass.
    """
    dataset = loader.dataset if dataset is None else dataset
    return loader_like(loader, cut_batches(loader), dataset if loader.num_workers else _InMemory(dataset))


class _InMemory(Dataset[Any]):
    """Samples of a data set, kept once they are read, up to `_MEMORY`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self._samples, self._size = dataset, dict[int, Any](), 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self._samples[index] if index in self._samples else self.dataset[index]
        if index not in self._samples and self._size < _MEMORY:
            self._samples[index] = sample
            self._size += _bytes(sample)
        return copy(sample)  # a collate function may take fields out


def _bytes(sample: Any) -> int:
    if isinstance(sample, Tensor):
        return sample.nbytes
    parts = sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, list | tuple) else ()
    return 64 + sum(map(_bytes, parts))
