"""Loaders that go on in the middle of an epoch: with the batches, and the augmentation, of an unbroken run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


class ResumableSampler(DistributedSampler[int]):
    """Shuffle a data set by seed and epoch alone, and start anywhere in it.

    Shares the samples between the processes itself, each the same number, for which some are repeated if need be.

    Args:
        dataset: Any data set with a length.
        num_replicas: Number of processes.
        rank: Number of this process, from 0.
        seed: Seed of the order, the same on all processes.
    """

    def __init__(self, dataset: Any, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.start = 0  # samples of this process to leave out once, as they had their turn before
        self.start_epoch: int | None = None  # in this epoch only, if it is known

    def order(self) -> Tensor:
        """Return the positions of all samples, in the order of this epoch, before processes share them: `[n]`."""
        return torch.randperm(len(self.dataset), generator=self.generator())  # type: ignore[arg-type]

    def generator(self) -> torch.Generator:
        """Return the source of this epoch's order."""
        return torch.Generator().manual_seed(self.seed + self.epoch)

    def __iter__(self) -> Iterator[int]:
        order, start = self.order(), self.start if self.start_epoch in (None, self.epoch) else 0
        self.start, self.start_epoch = 0, None
        # Repeated samples come last, so that the steps before are those of one process with the joined batch.
        mine = torch.arange(self.rank, self.total_size, self.num_replicas)[start:] % len(order)
        return iter(order[mine].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Tell sampler and data set which epoch it is: random transforms may depend on it."""
        super().set_epoch(epoch)
        if callable(of_dataset := getattr(self.dataset, "set_epoch", None)):
            of_dataset(epoch)


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader over a `ResumableSampler` that Lightning restores in mid-epoch: no batch twice, none left out."""

    _served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._served = self._start // (self.batch_size or 1)
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of which epoch have been served."""
        epoch = self.sampler.epoch if isinstance(self.sampler, ResumableSampler) else 0
        return {"batches": self._served % len(self), "epoch": epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start that epoch after the batches that were served; the next one, if it was over, at its beginning."""
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.start = state_dict["batches"] * (self.batch_size or 1)
            self.sampler.start_epoch = state_dict.get("epoch")

    @property
    def _start(self) -> int:
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler) or sampler.start_epoch not in (None, sampler.epoch):
            return 0
        return sampler.start


class EpochSeed:
    """A seed for each sample and epoch; loader processes see the epoch change, too."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def of(self, position: int) -> int:
        """Return the seed of a sample in this epoch."""
        return hash((self.seed, int(self.epoch), position)) % 2**63
