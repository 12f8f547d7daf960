"""Where in its epoch a plain training loader is, so that a resumed fit goes on with the next sample.

In: seed, epoch, the position in a checkpoint. Out: the batches from there on. Next: `resume.py`.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from flow_lightning.data.tracking import Recorder, can_be_followed
from flow_lightning.scoring.fingerprint import seed_generators


class Start(NamedTuple):
    """Where a fit starts."""

    epoch: int = 0
    batches: int = 0  #: batches of this epoch that had their turn
    checksum: int | None = None  #: of their samples; None if it is not known


class LoaderPosition:
    """Lets a `DataLoader` of a map-style data set start anywhere in an epoch, whatever its sampler.

    In each epoch torch's, numpy's and python's generators, and those that belong to the samplers, are seeded before the
    batch sampler runs. So its order follows seed and epoch alone, and batches that had their turn can be skipped.

    Attributes:
        seed: The seed of the run, the same in all processes.
        rank: Of this process: random transforms differ by it, the order of samples does not.
        start: Where the fit starts.
        epoch: Gives the number of the epoch that runs.
    """

    def __init__(self) -> None:
        self.seed, self.rank, self.start = 0, 0, Start()
        self.epoch: Callable[[], int] = lambda: self.start.epoch
        self._recorders: list[Recorder] = []
        self._own_seeds: dict[torch.Generator, int] = {}
        self._checksums: dict[int, int] = {}  # by number of batches of this epoch

    def restore(self, fit_loop: dict[str, Any], checksum: int | None) -> None:
        """Start where the loops of a checkpoint (`fit_loop`) are; `checksum` is that of the samples before."""
        epochs, batches = (fit_loop[name]["current"] for name in ("epoch_progress", "epoch_loop.batch_progress"))
        is_between = epochs["ready"] == epochs["processed"]
        self.start = Start(epochs["processed"], 0 if is_between else batches["processed"], checksum)

    def follow(self, loader: Any, is_training: Callable[[], bool]) -> None:
        """Follow a loader in the iterations that begin while `is_training()`, unless it has a position of its own.

        Loaders of iterable data sets, without a batch sampler or with `in_order=False` are left alone, too.
        """
        if hasattr(loader, "state_dict") or not can_be_followed(loader) or not loader.in_order:
            return
        recorder = Recorder.of(loader, is_training)
        recorder.order = self._order
        if recorder not in self._recorders:
            self._recorders.append(recorder)

    def lock(self, is_locked: bool) -> None:
        """Say whether an epoch is under way: what else iterates over the loader then does not count."""
        for recorder in self._recorders:
            recorder.is_locked = is_locked

    def checksum(self, fit_loop: dict[str, Any]) -> int | None:
        """Return the checksum of the samples that had their turn when the loops were there; forget earlier ones."""
        batches: int = fit_loop["epoch_loop.batch_progress"]["current"]["processed"]
        for number in [number for number in self._checksums if number < batches]:
            del self._checksums[number]
        return self._checksums.get(batches)

    def is_followed(self, loader: Any) -> bool:
        """Tell whether a loader is followed: not if it has a position of its own, and not one of several."""
        return any(recorder.loader is loader for recorder in self._recorders)

    def release(self) -> None:
        """Leave loaders and generators as they were."""
        for recorder in self._recorders:
            recorder.release()
            recorder.order = None
        for generator, seed in self._own_seeds.items():
            generator.manual_seed(seed)
        self._recorders, self._own_seeds = [], {}

    def _order(self, batches: Iterable[list[int]]) -> Iterator[list[int]]:
        """Yield the batches of an epoch, from the start on."""
        epoch, checksum = self.epoch(), 0
        skipped = self.start.batches if epoch == self.start.epoch else 0
        self._checksums = {skipped: self.start.checksum} if skipped and self.start.checksum is not None else {}
        self._prepare(batches, epoch)
        iterator = iter(batches)
        for number in count():
            if number == skipped and skipped:
                self._check(checksum, batches)
            seed_generators(hash((self.seed, epoch, number)))  # of a sampler that draws batch by batch
            indices = next(iterator, None)
            if indices is None:
                return
            checksum = zlib.crc32(repr(list(indices)).encode(), checksum)
            if number >= skipped:
                self._checksums[number + 1] = checksum
                seed_generators(hash((self.seed, epoch, number, self.rank)))  # of the transforms in this process
                yield indices

    def _prepare(self, batches: Any, epoch: int) -> None:
        """Give samplers the epoch, and their generators a seed of this epoch."""
        for part in _parts(batches):
            if isinstance(part, torch.Generator):
                part.manual_seed(hash((self._own_seeds.setdefault(part, part.initial_seed()), epoch)) % 2**63)
            elif callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def _check(self, checksum: int, batches: Any) -> None:
        """Refuse to go on where the samples before differ from those of the run that was interrupted."""
        if self.rank == 0 and self.start.checksum not in (None, checksum):
            raise RuntimeError(
                f"The first {self.start.batches} batches of this epoch are not those of the interrupted run: data set "
                f"or {type(batches).__name__} changed, or its order follows more than the seed. Use the samplers of "
                "torch or flow_lightning.ResumableSampler."
            )


def warn_if_it_begins_anew(trainer: Trainer) -> None:
    """Warn where a resumed fit begins an epoch anew in its middle, as Lightning does with plain loaders."""
    loader: Any = trainer.train_dataloader
    fit_loop: Any = trainer.fit_loop
    is_plain = isinstance(loader, DataLoader) and not hasattr(loader, "state_dict")
    begun = 0 < fit_loop.epoch_loop.batch_progress.current.processed < trainer.num_training_batches
    if is_plain and fit_loop.restarted_mid_epoch and begun and getattr(loader.batch_sampler, "order", None) is None:
        rank_zero_warn(
            "This fit resumes in the middle of an epoch, and its DataLoader begins the epoch anew: some samples come "
            "twice, others not at all. Add flow_lightning.ExactResumeCallback() to the callbacks of every run."
        )


def _parts(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and all samplers and generators in it."""
    yield sampler
    for part in list(getattr(sampler, "__dict__", {}).values()):
        if isinstance(part, torch.Generator):
            yield part
        elif isinstance(part, Sampler) or hasattr(part, "_sampler"):  # what Lightning's distributed sampler wraps
            yield from _parts(part)
