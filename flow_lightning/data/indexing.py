"""The index contract: each sample's integer `index` travels through the batch, so that its weight is found.

In: a map-style data set, or a batch. Out: samples with their position, and a batch's indices. Next: `tracking.py`.
"""

from collections.abc import Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

_FIX = (
    "Wrap the training data set once, in the data module's setup(): "
    "`self.train_set = flow_lightning.IndexedDataset(self.train_set)`."
)


class IndexedSample(NamedTuple):
    """A sample that is no dict, with its index: `(x, y), index = batch`."""

    sample: Any
    index: Any


class IndexedDataset(Dataset[Any]):
    """Add an integer `index` to each sample of a map-style data set.

    A dict sample gets the key `index`; any other sample, say `(x, y)`, becomes `IndexedSample(sample, index)`,
    which the default collate function turns into `IndexedSample((x, y), index [B])`. A list of positions gives
    a list of samples.

    Args:
        dataset: Any data set with `__getitem__` and `__len__`: a `Subset`, a `ConcatDataset`, a part of
            `random_split`, a Hugging Face data set.

    Raises:
        TypeError: If the data set is iterable-style or has no length.

    Example:
        >>> IndexedDataset([("a", 0), ("b", 1)])[1]
        IndexedSample(sample=('b', 1), index=1)
        >>> IndexedDataset([{"x": "a"}])[0]
        {'x': 'a', 'index': 0}
    """

    def __init__(self, dataset: Any) -> None:
        check_map_style(dataset)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a data set whose transforms depend on it."""
        if callable(of_dataset := getattr(self.dataset, "set_epoch", None)):
            of_dataset(epoch)

    def __getitem__(self, index: int | list[int]) -> Any:
        if isinstance(index, list):  # a sampler of batches, with batch_size=None
            return [self[position] for position in index]
        if index < 0:
            index += len(self)
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            return {**sample, "index": index}
        return IndexedSample(sample, index)


def batch_index(batch: Any, drawn: Tensor | None = None) -> Tensor:
    """Return the sample indices of a batch, `[B]`: its own, or those that the loader has drawn.

    Raises:
        KeyError: If neither is known; the message names the fix.
    """
    index = find_index(batch)
    index = drawn if index is None else index
    if index is None:
        found = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise KeyError(f"This batch ({found}) has no 'index', so the weights of its samples cannot be found. {_FIX}")
    return index


def part_of(whole: Any, key: str | int | None) -> Any:
    """Return the loader, or the batch, of one of several training loaders; all of it without a key.

    Raises:
        KeyError: If there is none of that name; the message lists those that there are.
    """
    whole = getattr(whole, "iterables", whole)  # of a CombinedLoader
    if key is None:
        return whole
    names = list(whole) if isinstance(whole, Mapping) else list(range(len(whole)))
    if key not in names:
        raise KeyError(f"There is no training loader {key!r}, but {names}. Give FlowWeightingCallback(loader=...) one.")
    return whole[key]


def find_index(batch: Any) -> Tensor | None:
    """Return the sample indices of a batch, `[B]`, or None if it carries none."""
    index = batch.get("index") if isinstance(batch, Mapping) else getattr(batch, "index", None)
    return index if isinstance(index, Tensor) else None


def select(batch: Any, positions: Tensor, size: int) -> Any:
    """Take some samples out of a batch of `size`, at any depth of dicts, tuples and lists.

    Each tensor `[size, ...]` becomes `[K, ...]`: the samples at `positions` `[K]`.

    Raises:
        TypeError: If something in it is no tensor of B samples, so that it is not clear what belongs to a sample.

    Example:
        >>> select({"x": torch.tensor([5, 6, 7]), "index": torch.tensor([0, 1, 2])}, torch.tensor([0, 2]), size=3)
        {'x': tensor([5, 7]), 'index': tensor([0, 2])}
    """

    def take(part: Any) -> Any:
        if isinstance(part, Tensor) and part.shape[:1] == (size,):
            return part[positions]
        if isinstance(part, Mapping):
            return {key: take(value) for key, value in part.items()}
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(take, part))
        if isinstance(part, list | tuple):
            holds_tensors = any(isinstance(value, Tensor | Mapping | list | tuple) for value in part)
            return [take(value) for value in part] if holds_tensors else [part[i] for i in positions.tolist()]
        raise TypeError(
            f"The batch of {size} samples holds a {type(part).__name__} that is not split by sample, so reduction="
            "'sampling' cannot take samples out of it. Let the collate function return tensors [B, ...], or use "
            "reduction='batch'."
        )

    return take(batch)


def check_map_style(dataset: Any) -> None:
    """Refuse a data set whose samples have no stable index.

    Raises:
        TypeError: If it is iterable-style or has no length; the message says what to do.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{type(dataset).__name__} is not a map-style data set: its samples have no position, so their weights "
            "cannot be found again. Load them into one with __getitem__ and __len__, such as `list(data)` or "
            "`datasets.Dataset.from_generator(...)`, and give that to the DataLoader."
        )


def check_indices(found: Tensor, expected: Tensor) -> None:
    """Check that the indices of the scored batches are exactly those asked for, each once.

    Raises:
        ValueError: If the data set numbers its samples in another way than by position.
    """
    if not torch.equal(found.cpu(), expected.cpu()):
        raise ValueError(
            f"Asked the data set for samples {expected[:8].tolist()} but their 'index' says {found[:8].tolist()}: "
            f"the index must be the position in the training data set, each once. {_FIX}"
        )
