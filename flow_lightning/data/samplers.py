"""Batches of similar length, so that little of a batch of texts is padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from flow_lightning.resume import ResumableSampler


def token_budget_batches(lengths: Sequence[int] | Tensor, budget: int) -> list[list[int]]:
    """Cut a data set into batches of similar length, each of at most `budget` tokens with its padding.

    The longest samples come first, so that a batch that does not fit into memory shows at once. A sample longer than
    the budget is a batch of its own.

    Args:
        lengths: Tokens of each sample, `[N]`.
        budget: Most tokens of a batch: its longest sample times its number of samples.

    Returns:
        Positions in the data set, each exactly once.

    Raises:
        ValueError: If the budget is not positive.

    Example:
        >>> token_budget_batches([3, 9, 4, 1], budget=8)
        [[1], [2, 0], [3]]
    """
    if budget < 1:
        raise ValueError(f"The token budget of a batch is {budget}; expected at least 1, say 8192.")
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    order = lengths.argsort(descending=True, stable=True)
    batches: list[list[int]] = []
    longest = 0
    for position, length in zip(order.tolist(), lengths[order].tolist()):
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = length
        batches[-1].append(position)
    return batches


class LengthGroupedSampler(ResumableSampler):
    """Shuffle a data set such that the samples of a batch have similar lengths.

    The data set is shuffled and cut into pools; each pool is sorted by length and cut into batches, one per process;
    then the batches of all pools are shuffled.

    Args:
        dataset: Any data set with a length.
        lengths: Tokens of each sample, `[N]`.
        batch_size: Samples per batch and process.
        num_replicas: Number of processes.
        rank: Number of this process, from 0.
        seed: Seed of the order, the same on all processes.
        pool: Batches that are sorted together. Fewer give more randomness and more padding; a data set that fits into
            one pool has nearly the same batches in each epoch.

    Raises:
        ValueError: If the lengths are not one per sample, the data set is empty, or a size is not positive.

    Example:
        >>> sampler = LengthGroupedSampler(range(4), [9, 1, 8, 2], batch_size=2)
        >>> sorted(sampler)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        dataset: Any,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        pool: int = 50,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed)
        if not 0 < len(dataset) == len(lengths):
            raise ValueError(f"Got {len(lengths)} lengths for {len(dataset)} samples; expected one each, at least one.")
        if batch_size < 1 or pool < 1:
            raise ValueError(f"Got batch_size={batch_size} and pool={pool}; expected both to be at least 1.")
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.batch_size, self.pool = batch_size, pool

    def order(self) -> Tensor:
        """Return the positions of all samples, `[n]`: the batches of all processes one after the other."""
        generator, count = self.generator(), self.lengths.numel()
        size = self.batch_size * self.num_replicas
        blocks = [
            block
            for pool in torch.randperm(count, generator=generator).split(self.pool * size)
            for block in pool[self.lengths[pool].argsort(stable=True)].split(size)
        ]
        # Only the last block can be short: anywhere else it would shift the batches after it across the blocks.
        last = [blocks.pop()] if len(blocks[-1]) < size else []
        order = torch.randperm(len(blocks), generator=generator).tolist()
        return torch.cat([blocks[position] for position in order] + last)


class FixedBatches(Sampler[list[int]]):
    """Batches of a data set that are always the same, each sample in one of them: batches of similar length, say.

    As the `batch_sampler` of a loader to score it says how to cut the data set, which then need not be in order.

    Args:
        batches: Positions in the data set, by batch.
    """

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)
