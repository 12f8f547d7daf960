"""Which samples are in a batch that carries no `index`: told by the order in which its loader's sampler gave them.

In: the training loader of a fit. Out: the indices of each batch, in turn. Next: `callbacks/flow_weighting.py`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from flow_lightning.data.indexing import find_index
from flow_lightning.lightning_internals import isolate_rng


class BatchTracker:
    """Follows a DataLoader of a map-style data set, whatever its samples, sampler, collate function and workers.

    A DataLoader hands out its batches in the order in which its batch sampler gave their indices, with workers and
    prefetching, too. So the n-th batch belongs to the n-th list of indices.
    """

    def __init__(self) -> None:
        self._followed: list[Recorder] = []
        self._recorder: Recorder | None = None  # of the loader that is trained on
        self._expected: int | None = 0  # number of the next batch; None if the fit may begin in mid-epoch

    def follow(self, loader: Any, is_training: Callable[[], bool] = lambda: True) -> None:
        """Follow a loader where `is_training()`, unless its batches carry an index or it has no batch sampler.

        Raises:
            ValueError: If the loader hands out its batches in any order (`in_order=False`).
        """
        if not can_be_followed(loader) or _is_indexed(loader):
            return
        if not loader.in_order:
            raise ValueError(
                "The training loader has in_order=False, so it cannot be told which samples are in a batch. Use "
                "in_order=True, or wrap the data set in flow_lightning.IndexedDataset."
            )
        recorder = Recorder.of(loader, is_training)
        recorder.is_noting = True
        if recorder not in self._followed:
            self._followed.append(recorder)

    def begin(self, loader: Any, is_resumed: bool = False, is_iterated_anew: bool = False) -> None:
        """Expect the batches of the loader that is trained on, and let go of others: a tuner may have made some.

        Workers may have drawn its first batches already. What begins to iterate over it now, such as a hook that looks
        at samples, does not count. With `is_iterated_anew` the fit itself is yet to begin this epoch's iteration. A fit
        that `is_resumed` may begin in the middle of an epoch.
        """
        self._expected = None if is_resumed else 0
        for recorder in self._followed:
            if recorder.loader is not loader:
                recorder.release()
        self._followed = [recorder for recorder in self._followed if recorder.loader is loader]
        self._recorder = self._followed[0] if self._followed else None
        if self._recorder is not None:
            self._recorder.is_locked = self._recorder.is_begun and not is_iterated_anew

    def index(self, batch_idx: int) -> Tensor | None:
        """Return the indices of the samples in a batch, `[B]` on the CPU; None if no loader is followed.

        Lightning calls no hook for a batch that is None, but counts it: such batches are skipped. From here to
        `end_epoch`, what else iterates over the loader does not count.

        Raises:
            RuntimeError: If the loader's sampler gave no more indices.
            TypeError: If what it gave are no positions.
        """
        skipped = 0 if self._expected is None else batch_idx - self._expected
        self._expected = batch_idx + 1
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
        return _positions(self._recorder.lists.popleft())

    def end_epoch(self) -> None:
        """Expect the next epoch's iteration."""
        self._expected = 0
        if self._recorder is not None:
            self._recorder.is_locked = False

    def release(self) -> None:
        """Give loaders their own batch samplers back."""
        for recorder in self._followed:
            recorder.release()
        self._followed, self._recorder = [], None


class Recorder(Sampler[list[int]]):
    """Stands for the batch sampler of a training loader, for all who follow that loader.

    Attributes:
        loader: The loader.
        batches: Its own batch sampler.
        is_training: Tells whether an iteration that begins is one of training.
        is_locked: Whether an epoch is under way, so that iterations that begin now do not count.
        is_begun: Whether an iteration has begun that counts.
        is_noting: Whether indices are written down.
        lists: The indices of the epoch's batches, from the next one on.
        order: Runs the batch sampler for an epoch, in place of `iter`.
    """

    def __init__(self, loader: DataLoader[Any], is_training: Callable[[], bool]) -> None:
        self.loader, self.batches, self.is_training = loader, cast(Any, loader.batch_sampler), is_training
        self.is_locked, self.is_begun, self.is_noting, self._is_at_end = False, False, False, False
        self.lists: deque[list[int]] = deque()
        self.order: Callable[[Any], Iterator[list[int]]] | None = None

    @classmethod
    def of(cls, loader: DataLoader[Any], is_training: Callable[[], bool]) -> "Recorder":
        """Return the recorder of a loader, which gets one if it has none."""
        if isinstance(loader.batch_sampler, Recorder):
            return loader.batch_sampler
        recorder = cls(loader, is_training)
        object.__setattr__(loader, "batch_sampler", recorder)  # a DataLoader refuses to be given another one
        return recorder

    def release(self) -> None:
        """Give the loader its own batch sampler back."""
        if self.loader.batch_sampler is self:
            object.__setattr__(self.loader, "batch_sampler", self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Decide now, not with the first batch, whether this iteration counts: workers draw ahead."""
        lists: deque[list[int]] = deque()
        counts = self.is_training() and not self.is_locked
        if counts:
            self.lists, self.is_begun = lists, True  # a new epoch: an iterator of the last one writes elsewhere
        elif self.is_training() and self._is_at_end:
            lists = self.lists  # beside a longer loader this one begins anew
        self._is_at_end = False
        return self._draw(lists, counts)

    def _draw(self, lists: deque[list[int]], counts: bool) -> Iterator[list[int]]:
        for indices in self.order(self.batches) if counts and self.order is not None else self.batches:
            indices = list(indices)
            if self.is_noting:
                lists.append(indices)
            yield indices
        self._is_at_end = lists is self.lists

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def can_be_followed(loader: Any) -> bool:
    """Tell whether a loader is a DataLoader with a batch sampler of positions in a map-style data set."""
    is_map_style = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return is_map_style and loader.batch_sampler is not None


def watch_training_loader(trainer: Trainer, follow: Callable[[Any, Callable[[], bool]], None]) -> None:
    """Call a function with the training loader, and with one that tells whether the fit is training.

    It is called as soon as the loader is made, which `configure_optimizers` may already cause.
    """
    process = trainer.strategy.process_dataloader

    def process_and_follow(loader: object) -> object:
        processed = process(loader)
        if trainer.training:
            follow(processed, lambda: trainer.training)
        return processed

    vars(trainer.strategy)["process_dataloader"] = process_and_follow


def stop_watching(trainer: Trainer) -> None:
    """Leave the strategy as it was."""
    vars(trainer.strategy).pop("process_dataloader", None)


def _positions(drawn: list[Any]) -> Tensor:
    try:
        positions = torch.tensor(drawn)
    except (TypeError, ValueError):
        positions = torch.empty(0)
    if positions.ndim != 1 or positions.is_floating_point():
        raise TypeError(
            f"The sampler of the training loader yields {drawn[0]!r}, which is no position in a data set, so it is not "
            "known which samples are in a batch. Let it yield integers, and let the data set do the rest."
        )
    return positions


def _is_indexed(loader: DataLoader[Any]) -> bool:
    with isolate_rng():
        return find_index(loader.collate_fn([loader.dataset[0]])) is not None
