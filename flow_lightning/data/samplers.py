"""The order of samples: batches of similar length, so that texts need little padding, and random splits.

In: lengths, or a number of samples. Out: positions in a data set. Next: `images.py`, `instructions/`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from flow_lightning.resume import ResumableSampler


def token_budget_batches(lengths: Sequence[int] | Tensor, budget: int) -> list[list[int]]:
    """Cut a data set into batches of similar length: each position `[0, N)` once, the longest samples first.

    Args:
        lengths: Tokens of each sample, `[N]`.
        budget: Most tokens of a batch with its padding. A longer sample is a batch of its own.

    Raises:
        ValueError: If the budget is less than 1.

    Example:
        >>> token_budget_batches([3, 9, 4, 1], budget=8)
        [[1], [2, 0], [3]]
    """
    if budget < 1:
        raise ValueError(f"The token budget of a batch is {budget}. Set tokens_per_batch to 1 or more, such as 8192.")
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

    The data set is shuffled and cut into pools of `pool` batches. Each pool is sorted by length and cut into batches,
    one per process. Then the batches of all pools are shuffled. A data set that fits into one pool has nearly the same
    batches in each epoch. `lengths` `[N]` are in tokens, and `batch_size` is that of one process.

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
        self.lengths, self.batch_size, self.pool = torch.as_tensor(lengths), batch_size, pool

    def order(self) -> Tensor:
        """Return the positions of all samples, `[n]`: one batch after the other, for all processes."""
        generator, count = self.generator(), self.lengths.numel()
        size = self.batch_size * self.num_replicas
        blocks = [
            block
            for pool in torch.randperm(count, generator=generator).split(self.pool * size)
            for block in pool[self.lengths[pool].argsort(stable=True)].split(size)
        ]
        # A short block must come last. Anywhere else it would shift the batches that follow across the blocks.
        last = [blocks.pop()] if len(blocks[-1]) < size else []
        order = torch.randperm(len(blocks), generator=generator).tolist()
        return torch.cat([blocks[position] for position in order] + last)


class FixedBatches(Sampler[list[int]]):
    """A batch sampler of the same batches of positions in every epoch; a data set is scored in its order."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def split_positions(count: int, first: float, seed: int) -> tuple[list[int], list[int]]:
    """Split `range(count)` at random into two parts, each in ascending order. `first` is the share of the first."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    border = max(0, round(first * count))
    return sorted(order[:border]), sorted(order[border:])


def hold_out(count: int, validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split samples into a part for validation and the part to train on, or raise ValueError if one is empty."""
    held_out, kept = split_positions(count, validation_fraction, seed)
    if validation_fraction and not (held_out and kept):
        raise ValueError(
            f"validation_fraction={validation_fraction} of {count} training samples leaves {len(kept)} to train and "
            f"{len(held_out)} to validate. Choose a fraction between 0 and 1, or 0 for no validation."
        )
    return held_out, kept
