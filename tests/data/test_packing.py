import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.data.packing import PackedBatches, best_fit_batches
from tests.data.instructions.test_module import Recorder
from tests.examples import chain, fit, make_trainer
from tests.language import language_data, language_module

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def packed(lengths, world=1, epoch=0, budget=100, **settings):
    """Return the batches of each process."""
    samplers = [PackedBatches(lengths, budget, world, rank, **settings) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
    return [list(sampler) for sampler in samplers]


def tokens(batches, lengths):
    return sorted(sum(lengths[position] for position in batch) for batch in batches)


@given(LENGTHS, st.integers(1, 130))
def test_each_sample_goes_into_the_fullest_batch_that_can_take_it(lengths, budget):
    expected = []  # tokens of each batch, by a search through all of them
    for length in sorted(lengths, reverse=True):
        fitting = [total for total in expected if total + length <= budget]
        if fitting:
            expected.remove(max(fitting))
        expected.append(max(fitting, default=0) + length)
    batches = best_fit_batches(lengths, budget)
    assert batches == best_fit_batches(torch.tensor(lengths), budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert tokens(batches, lengths) == sorted(expected)
    assert all(sum(lengths[position] for position in batch) <= budget or len(batch) == 1 for batch in batches)


@given(LENGTHS, st.integers(1, 5), st.integers(0, 3))
def test_processes_take_equally_many_batches_and_each_sample_once(lengths, world, epoch):
    assume(len(lengths) >= len(best_fit_batches(lengths, 100)) + world)
    ranks = packed(lengths, world, epoch)
    assert len({len(batches) for batches in ranks}) == 1
    together = [batch for batches in ranks for batch in batches]
    assert sorted(position for batch in together for position in batch) == list(range(len(lengths)))
    assert max(tokens(together, lengths)) <= 100
    assert len(together) - len(best_fit_batches(lengths, 100)) < world, "no more batches than that takes"


def test_too_few_samples_for_the_processes_come_twice():
    ranks = packed([60, 60, 60], world=2)
    assert [len(batches) for batches in ranks] == [2, 2]
    assert {position for batches in ranks for batch in batches for position in batch} == {0, 1, 2}


def test_each_epoch_and_seed_shuffles_batches_and_the_samples_of_one_length():
    lengths = random.Random(0).choices(range(5, 25), k=400)
    first, again, other, seed = (packed(lengths, epoch=e, seed=s)[0] for e, s in ((0, 1), (0, 1), (1, 1), (0, 2)))
    assert first == again
    for batches in (other, seed):
        assert tokens(batches, lengths) == tokens(first, lengths) and len(batches) == len(first)
        assert [len(batch) for batch in batches] != [len(batch) for batch in first], "another order of the batches"
        kept = {frozenset(batch) for batch in batches} & {frozenset(batch) for batch in first}
        assert len(kept) < 0.1 * len(first), "other samples in a batch"


def test_a_plain_loader_takes_it_as_batch_sampler():
    loader = DataLoader(list(range(5)), batch_sampler=PackedBatches([9, 3, 5, 5, 1], 10))
    assert sorted(sorted(batch.tolist()) for batch in loader) == [[0, 4], [1], [2, 3]]


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(budget):
    with pytest.raises(ValueError, match="Set packed_tokens to 1 or more"):
        best_fit_batches([3, 9], budget)


def test_a_packed_sample_has_the_loss_that_it_has_alone(tmp_path):
    data, module = language_data(tmp_path, 40, packed_tokens=256), language_module().eval()
    seen = []
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] <= 256 and "position_ids" in batch
        with torch.no_grad():
            losses = module.sample_losses(batch)
            for loss, index in zip(losses, batch["index"].tolist()):
                sample = data.train_set[index]
                ids = sample["input_ids"][None]
                labels = ids.clone()
                labels[:, : sample["prompt_length"]] = -100
                own = module.causal_lm(input_ids=ids, labels=labels).loss  # transformers' own, of this sample alone
                torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-5)
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(40)) and len(data.train_dataloader()) < 40 / 2


def test_weights_follow_their_samples_into_packed_batches(tmp_path):
    """The gradient of one step over two batches is that of the weighted losses of single samples."""
    data, flow = language_data(tmp_path, 9, packed_tokens=200), fl.FlowWeightingCallback()
    count = len(data.train_dataloader())
    assert count > 1
    settings = {"learning_rate": 0.1, "warmup": 0.0, "schedule": "constant", "optimizer": torch.optim.SGD}
    trained, _ = fit(flow, module=language_module(**settings), data=data, max_epochs=1, accumulate_grad_batches=count)
    module, total = language_module(**settings), 0
    for index, weight in enumerate(flow.weights.of(torch.arange(9))):
        sample = data.train_set[index]
        ids, start = sample["input_ids"][None], sample["prompt_length"]
        logits = module(ids)[0, start - 1 : -1]
        total = total + weight * torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
    (total / data.train_set.dataset.supervised.sum()).backward()
    for parameter, after in zip(module.parameters(), trained.parameters()):
        step = -0.1 * parameter.grad
        assert ((after - parameter) - step).norm() <= 1e-4 * step.norm() + 1e-6


def test_a_packed_fit_killed_in_its_second_epoch_ends_as_the_unbroken_one(tmp_path):
    def fit_once(*callbacks, **settings):
        keep = ModelCheckpoint("ckpt", save_last=True, every_n_train_steps=1)
        data = language_data(tmp_path, 20, packed_tokens=200)
        callbacks, settings = [fl.FlowWeightingCallback(), keep, *callbacks], {"max_epochs": 2} | settings
        module, _ = fit(*callbacks, module=language_module(), data=data, enable_checkpointing=True, **settings)
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    batches = len(language_data(tmp_path, 20, packed_tokens=200).train_dataloader())
    assert torch.equal(chain(fit_once, 1, batches), chain(fit_once))


class Noting(Recorder):
    """Notes the batches of each epoch and process."""

    def training_step(self, batch):
        self.epochs[-1].append(batch["index"].tolist())
        return self.weight

    def on_train_end(self):
        torch.save(self.epochs, f"rank{self.global_rank}.pt")


def test_two_processes_train_on_each_sample_once_in_each_epoch(tmp_path):
    data = language_data(tmp_path, 21, packed_tokens=250)
    make_trainer(devices=2, strategy="ddp_fork", max_epochs=2).fit(Noting(), data)
    ranks = [torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(ranks[0]) == 2
    for first, second in zip(*ranks, strict=True):
        assert len(first) == len(second) > 1
        assert sorted(index for batch in first + second for index in batch) == list(range(21))
