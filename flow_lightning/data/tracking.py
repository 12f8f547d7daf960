"""Which samples are in a batch that carries no `index`: told by the order in which its loader's sampler gave them.

In: the training loader of a fit. Out: the indices of each batch, in turn. Next: `callbacks/flow_weighting.py`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from flow_lightning.data.indexing import find_index


class BatchTracker:
    """Follows a DataLoader of a map-style data set, whatever its samples, sampler, collate function and workers.

    A DataLoader hands out its batches in the order in which its batch sampler gave their indices, with workers and
    prefetching, too. So the n-th batch belongs to the n-th list of indices.
    """

    def __init__(self) -> None:
        self._followed: list[tuple[DataLoader[Any], _Recorder]] = []
        self._recorder: _Recorder | None = None

    def follow(self, loader: Any, is_training: Callable[[], bool] = lambda: True) -> None:
        """Follow a loader where `is_training()`, unless its batches carry an index or it has no batch sampler.

        Raises:
            ValueError: If the loader hands out its batches in any order (`in_order=False`).
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or _is_indexed(loader):
            return
        if loader.batch_sampler is None:
            return
        if not getattr(loader, "in_order", True):
            raise ValueError(
                "The training loader has in_order=False, so it cannot be told which samples are in a batch. Use "
                "in_order=True, or wrap the data set in flow_lightning.IndexedDataset."
            )
        self._followed.append((loader, _Recorder(loader.batch_sampler, is_training)))
        object.__setattr__(loader, "batch_sampler", self._followed[-1][1])  # a DataLoader refuses to be given another

    def choose(self, loader: Any) -> None:
        """Take the loader that is trained on, and let go of others: a tuner may have made some."""
        chosen = [pair for pair in self._followed if pair[0] is loader]
        self._followed, others = chosen, [pair for pair in self._followed if pair[0] is not loader]
        self._recorder = chosen[0][1] if chosen else None
        _give_back(others)

    @property
    def is_following(self) -> bool:
        """Whether a loader is followed."""
        return bool(self._followed)

    def next_index(self, skipped: int = 0) -> Tensor | None:
        """Return the indices of the next batch but for those skipped, `[B]` on the CPU; None if no loader is followed.

        From here to `end_epoch`, what else iterates over the loader does not count.

        Raises:
            RuntimeError: If the loader's sampler gave no more indices.
        """
        if self._recorder is None:
            return None
        self._recorder.is_locked = True
        if len(self._recorder.lists) <= skipped:
            raise RuntimeError(
                "It is not known which samples are in this batch: the training loader was already being iterated. Make "
                "it anew for the fit, or wrap its data set in flow_lightning.IndexedDataset."
            )
        for _ in range(skipped):
            self._recorder.lists.popleft()
        return torch.tensor(self._recorder.lists.popleft())

    def end_epoch(self) -> None:
        """Expect the next epoch's iteration."""
        if self._recorder is not None:
            self._recorder.is_locked = False

    def release(self) -> None:
        """Give loaders their own batch samplers back."""
        _give_back(self._followed)
        self._followed, self._recorder = [], None


def _give_back(followed: list[tuple[DataLoader[Any], "_Recorder"]]) -> None:
    for loader, recorder in followed:
        object.__setattr__(loader, "batch_sampler", recorder.batches)


class _Recorder(Sampler[list[int]]):
    """A batch sampler that writes down what it gives out; all else is as in the one that it stands for."""

    def __init__(self, batches: Any, is_training: Callable[[], bool]) -> None:
        self.batches, self.is_training, self.is_locked = batches, is_training, False
        self.lists: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        lists: deque[list[int]] = deque()
        if self.is_training() and not self.is_locked:
            self.lists = lists  # a new epoch: an iterator of the last one writes elsewhere
        for indices in self.batches:
            indices = list(indices)
            lists.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def _is_indexed(loader: DataLoader[Any]) -> bool:
    with isolate_rng():
        return find_index(loader.collate_fn([loader.dataset[0]])) is not None
