"""Several micro-batches, or several processes, give the gradient of one big batch."""

from operator import itemgetter

import pytest
import torch
from lightning import seed_everything
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.callbacks.step_denominator import StepDenominator
from tests.examples import Kill, make_trainer

SIZES = [3, 1, 4, 2, 5, 1]  # rows of the micro-batches: all of different size, and a last window that is short


class Linear(fl.WeightedLossModule):
    def __init__(self, reduction, n):
        super().__init__(reduction)
        seed_everything(0, verbose=False)  # of forked processes, too
        self.linear = torch.nn.Linear(4, 1)
        self.sample_weights = fl.SampleWeights.from_losses(torch.rand(n, generator=torch.Generator().manual_seed(1)))
        self.gradients: list[torch.Tensor] = []

    def sample_losses(self, batch):
        return (self.linear(batch["x"]).squeeze(1) - 1).square()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.linear.parameters()]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)  # the gradients of all steps are at one point


def loader_of(sizes, sampler=None):
    """Samples are whole micro-batches, as a user with ragged batches has them."""
    x, index = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(0)), torch.arange(sum(sizes))
    rows = [{"x": part, "index": own} for part, own in zip(x.split(sizes), index.split(sizes))]
    return DataLoader(rows, batch_size=1, collate_fn=itemgetter(0), sampler=sampler)


def gradients(reduction, sizes, *callbacks, kind=Linear, **settings):
    module = kind(reduction, sum(sizes))
    make_trainer(*callbacks, **settings).fit(module, loader_of(sizes))
    return module.gradients


@pytest.mark.parametrize("reduction", ["batch", "weights", "sampling"])
def test_accumulated_micro_batches_are_one_big_batch(reduction):
    """Windows of 4 and 2 micro-batches of different sizes, against two batches of 10 and 6."""
    accumulated = gradients(reduction, SIZES, accumulate_grad_batches=4)
    torch.testing.assert_close(accumulated, gradients(reduction, [10, 6]), rtol=1e-5, atol=1e-7)
    assert len(accumulated) == 2


def test_lightnings_own_division_would_differ():
    """The test above can fail: without the callback the gradients are others."""

    class Plain(Linear):
        def configure_callbacks(self):
            return []

    found, expected = gradients("batch", SIZES, kind=Plain, accumulate_grad_batches=4), gradients("batch", [10, 6])
    assert (found[0] - expected[0]).norm() > 0.05 * expected[0].norm()


def test_clipping_sees_the_normalised_gradient():
    clipped = gradients("batch", SIZES, accumulate_grad_batches=4, gradient_clip_val=0.25)
    expected = gradients("batch", [10, 6])
    for gradient, plain in zip(clipped, expected):
        torch.testing.assert_close(gradient, plain * min(1.0, 0.25 / plain.norm().item()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batch", "weights", "sampling"])
def test_two_processes_are_one_big_batch(reduction):
    """Rank r takes micro-batches r, r + 2, ...; steps of 3+1, 4+2 and 5+1 rows."""
    trainer = make_trainer(devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    trainer.fit(TwoRanks(reduction, sum(SIZES)))
    found = [torch.load(f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], gradients(reduction, [4, 6, 6]), rtol=1e-5, atol=1e-7)


class TwoRanks(Linear):
    def train_dataloader(self):
        return loader_of(SIZES, sampler=range(self.trainer.global_rank, len(SIZES), 2))

    def on_train_end(self):
        torch.save(self.gradients, f"{self.trainer.global_rank}.pt")


class Own(Linear):
    def on_before_optimizer_step(self, optimizer):
        """Does not call its base class."""


@pytest.mark.parametrize(("callbacks", "kind"), [((), Own), ((StepDenominator(),), Linear)])
def test_neither_a_hook_of_the_users_own_nor_a_second_callback_changes_anything(callbacks, kind):
    found = gradients("batch", SIZES, *callbacks, kind=kind, accumulate_grad_batches=4)
    assert torch.equal(torch.stack(found), torch.stack(gradients("batch", SIZES, accumulate_grad_batches=4)))


class Decayed(Linear):
    """Adds a term of its own to the loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 3 * self.linear.weight.square().sum()


def test_a_term_that_is_added_to_the_loss_keeps_its_weight():
    expected = gradients("batch", [10, 6], kind=Decayed)
    found = gradients("batch", [3, 1, 6, 5, 1], kind=Decayed, accumulate_grad_batches=3)
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-5, atol=1e-7)


def test_an_unfinished_step_does_not_spoil_the_next_fit():
    module, loader = Linear("batch", sum(SIZES)), loader_of(SIZES)
    with pytest.raises(SystemExit):
        make_trainer(Kill(1), accumulate_grad_batches=4).fit(module, loader)
    module.zero_grad()
    make_trainer(accumulate_grad_batches=4).fit(module, loader)
    torch.testing.assert_close(module.gradients, gradients("batch", [10, 6]), rtol=1e-5, atol=1e-7)
