"""Packing: samples joined into batches that hold nearly as many tokens as allowed, each sample whole and in one batch.

In: lengths, most tokens of a batch. Out: lists of positions, by epoch and process. Next: `instructions/module.py`.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flow_lightning.resume import ResumableSampler


def best_fit_batches(lengths: Sequence[int] | Tensor, budget: int) -> list[list[int]]:
    """Pack a data set into few batches by best fit: each position `[0, N)` once.

    The longest samples come first. Each goes into the fullest batch that can still take it, or begins a new one.
    Source: "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), which cuts texts that are too long.

    Args:
        lengths: Tokens of each sample, `[N]`.
        budget: Most tokens of a batch, without padding. A longer sample is a batch of its own.

    Raises:
        ValueError: If the budget is less than 1.

    Example:
        >>> best_fit_batches([3, 7, 5, 1], budget=8)
        [[1, 3], [2, 0]]
    """
    if budget < 1:
        raise ValueError(f"A packed batch has {budget} tokens. Set packed_tokens to 1 or more, such as 4096.")
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    order = lengths.argsort(descending=True, stable=True)
    batches: list[list[int]] = []
    capacities: list[int] = []  # how many tokens batches can still take: each number once, in ascending order
    with_capacity: dict[int, list[int]] = {}  # the numbers of those batches
    for position, length in zip(order.tolist(), lengths[order].tolist()):
        place = bisect_left(capacities, length)
        if place < len(capacities):
            capacity = capacities[place]
            number = with_capacity[capacity].pop()
            if not with_capacity[capacity]:
                del capacities[place]
        else:
            capacity, number = budget, len(batches)
            batches.append([])
        batches[number].append(position)
        if (rest := capacity - length) > 0:
            if not with_capacity.setdefault(rest, []):
                insort(capacities, rest)
            with_capacity[rest].append(number)
    return batches


class PackedBatches(ResumableSampler):
    """Give batches of at most `budget` tokens, packed by best fit: lists of positions, shuffled by seed and epoch.

    The packing is made once, so each epoch has the same number of batches. What an epoch draws is their order, and
    which of the samples of one length takes which place. If the batches cannot be shared evenly between processes, the
    ones with most samples are halved until they can. So each sample is trained on once, in any number of processes.
    Only a data set with fewer samples than that takes has some batches twice, as `ResumableSampler` does.

    Give it to a `DataLoader` as `batch_sampler`, or as `sampler` with `batch_size=None` over an `IndexedDataset`.
    Lightning sees in the latter that processes share the samples already, and `ResumableDataLoader` keeps its position.

    Args:
        lengths: Tokens of each sample, `[N]`.
        budget: Most tokens of a batch of one process. A longer sample is a batch of its own.
        num_replicas, rank, seed: As of `ResumableSampler`.

    Example:
        >>> sorted(map(len, PackedBatches([3, 7, 5, 1], budget=8)))
        [2, 2]
    """

    def __init__(
        self, lengths: Sequence[int] | Tensor, budget: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        batches = best_fit_batches(lengths, budget)
        while len(batches) % num_replicas and len(most := max(batches, key=len)) > 1:
            batches.append(most[1::2])
            most[:] = most[::2]
        super().__init__(range(len(batches)), num_replicas, rank, seed)
        self.lengths = torch.as_tensor(lengths)
        self.positions = torch.tensor([position for batch in batches for position in batch])
        self.sizes = [len(batch) for batch in batches]

    def batches(self) -> list[list[int]]:
        """Return the batches of this epoch, of all processes, before they are shuffled."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        drawn = torch.randperm(len(self.lengths), generator=generator)
        sample = torch.empty_like(drawn)  # which one takes the place of each; of the same length
        sample[self.lengths.argsort(stable=True)] = drawn[self.lengths[drawn].argsort(stable=True)]
        return [batch.tolist() for batch in sample[self.positions].split(self.sizes)]

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        batches = self.batches()
        return (batches[number] for number in super().__iter__())
