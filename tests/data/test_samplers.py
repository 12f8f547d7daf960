import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from flow_lightning.data.samplers import LengthGroupedSampler, split_positions, token_budget_batches


def padding(batches, lengths):
    return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)


def random_lengths(n):
    return random.Random(0).choices(range(1, 501), k=n)


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
def test_budget_batches_are_a_partition_within_the_budget(lengths, budget):
    batches = token_budget_batches(lengths, budget)
    assert batches == token_budget_batches(torch.tensor(lengths), budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in batch) * len(batch) <= budget or len(batch) == 1 for batch in batches)
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)
    # Greedy: no batch could have taken the first sample of the next one.
    assert all(lengths[batch[0]] * (len(batch) + 1) > budget for batch in batches[:-1])


@given(st.integers(1, 120), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_ranks_share_all_samples_evenly(n, batch_size, world, pool, epoch):
    ranks = []
    for rank in range(world):
        sampler = LengthGroupedSampler(range(n), random_lengths(n), batch_size, world, rank, pool=pool)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    together = [i for indices in ranks for i in indices]
    assert len({len(indices) for indices in ranks}) == 1 and set(together) == set(range(n))
    assert len(together) - n == -n % world and max(map(together.count, range(n))) <= -(-world // n) + 1


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_hold_similar_lengths_in_random_order(rank):
    lengths = random_lengths(1003)
    sampler = LengthGroupedSampler(range(1003), lengths, 4, 2, rank)
    batches = list(BatchSampler(sampler, 4, drop_last=False))
    shuffled = random.Random(0).sample(range(1003), len(sampler))
    assert padding(batches, lengths) < 0.1 * padding(BatchSampler(shuffled, 4, drop_last=False), lengths)
    longest = torch.tensor([float(max(lengths[i] for i in batch)) for batch in batches])
    assert abs(torch.corrcoef(torch.stack([longest, torch.arange(len(batches))]))[0, 1]) < 0.3


def test_both_ranks_get_similar_lengths_at_each_step():
    lengths = random_lengths(800)
    first, second = (list(LengthGroupedSampler(range(800), lengths, 4, 2, rank)) for rank in range(2))
    both = [first[i : i + 4] + second[i : i + 4] for i in range(0, 400, 4)]
    assert max(max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in both) < 50


def test_splits_are_complete_disjoint_and_repeatable():
    first, second = split_positions(103, 0.8, seed=1)
    assert sorted(first + second) == list(range(103)) and len(first) == 82
    assert (first, second) == split_positions(103, 0.8, seed=1) != split_positions(103, 0.8, seed=2)
    assert first == sorted(first) and second == sorted(second)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_token_budget_below_one_is_refused(budget):
    with pytest.raises(ValueError, match="Set tokens_per_batch to 1 or more"):
        token_budget_batches([3, 9], budget)
