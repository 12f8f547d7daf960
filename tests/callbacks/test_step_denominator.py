"""Several micro-batches, or several processes, give the gradient of one big batch."""

import pytest
import torch
from lightning import Callback, seed_everything
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import flow_lightning as fl
from flow_lightning.callbacks.step_denominator import StepDenominator
from flow_lightning.contract import BatchLosses
from flow_lightning.method.objective import denominator
from tests.examples import make_trainer

SIZES = [3, 1, 4, 2, 5, 1]  # rows of the micro-batches: all of different size, and a last window that is short


class Rows(Dataset):
    """Samples that are whole micro-batches, as a user with ragged batches has them."""

    def __init__(self, sizes):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(sum(sizes), 4, generator=generator)
        self.ends = torch.tensor(sizes).cumsum(0)
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        index = torch.arange(int(self.ends[i]) - self.sizes[i], int(self.ends[i]))
        return {"x": self.x[index], "index": index}


def whole(batch):
    return batch[0]


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


def loader_of(sizes):
    return DataLoader(Rows(sizes), batch_size=1, collate_fn=whole)


def gradients(reduction, sizes, kind=None, **settings):
    module = (kind or Linear)(reduction, sum(sizes))
    make_trainer(**settings).fit(module, loader_of(sizes))
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

    module = Plain("batch", sum(SIZES))
    make_trainer(accumulate_grad_batches=4).fit(module, loader_of(SIZES))
    expected = gradients("batch", [10, 6])
    assert (module.gradients[0] - expected[0]).norm() > 0.05 * expected[0].norm()


def test_the_value_is_that_of_the_micro_batch():
    module = Linear("batch", 16)
    values = []
    module.training_step = lambda batch, batch_idx: values.append(step(batch, batch_idx)) or values[-1]
    step = fl.WeightedLossModule.training_step.__get__(module)
    make_trainer(accumulate_grad_batches=4).fit(module, loader_of(SIZES))
    rows, weights = Rows(SIZES), module.sample_weights.weights
    for i, value in enumerate(values):
        batch = rows[i]
        plain = (weights[batch["index"]] * module.sample_losses(batch)).mean()
        torch.testing.assert_close(value.detach(), plain.detach())


def test_clipping_sees_the_normalised_gradient():
    clipped = gradients("batch", SIZES, accumulate_grad_batches=4, gradient_clip_val=0.25)
    expected = gradients("batch", [10, 6])
    for gradient, plain in zip(clipped, expected):
        torch.testing.assert_close(gradient, plain * min(1.0, 0.25 / plain.norm().item()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batch", "weights", "sampling"])
def test_two_processes_are_one_big_batch(reduction, tmp_path):
    """Rank r takes micro-batches r, r + 2, ...; steps of 3+1, 4+2 and 5+1 rows."""
    module = TwoRanks(reduction, sum(SIZES), str(tmp_path))
    trainer = make_trainer(devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    trainer.fit(module)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], gradients(reduction, [4, 6, 6]), rtol=1e-5, atol=1e-7)


class TwoRanks(Linear):
    def __init__(self, reduction, n, folder):
        super().__init__(reduction, n)
        self.folder = folder

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return DataLoader(Rows(SIZES), batch_size=1, collate_fn=whole, sampler=range(rank, len(SIZES), 2))

    def on_train_end(self):
        torch.save(self.gradients, f"{self.folder}/{self.trainer.global_rank}.pt")


def test_no_trainer_is_a_plain_loss():
    module = Linear("batch", 16)
    batch = Rows(SIZES)[0]
    loss = module.weighted_loss(batch, module.sample_losses(batch))
    loss.backward()
    gradient = torch.autograd.grad(
        (module.sample_weights.lookup(batch["index"]) * module.sample_losses(batch)).mean(), module.linear.weight
    )
    torch.testing.assert_close(module.linear.weight.grad, gradient[0])


class Own(Linear):
    def on_before_optimizer_step(self, optimizer):
        """Does not call its base class."""


def test_a_hook_of_the_users_own_changes_nothing():
    module = Own("batch", sum(SIZES))
    make_trainer(accumulate_grad_batches=4).fit(module, loader_of(SIZES))
    assert torch.equal(torch.stack(module.gradients), torch.stack(gradients("batch", SIZES, accumulate_grad_batches=4)))


class Decayed(Linear):
    """Adds a term of its own to the loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 3 * self.linear.weight.square().sum()


def test_a_term_that_is_added_to_the_loss_keeps_its_weight():
    expected, module = gradients("batch", [10, 6], kind=Decayed), Decayed("batch", sum(SIZES))
    make_trainer(accumulate_grad_batches=3).fit(module, loader_of([3, 1, 6, 5, 1]))
    torch.testing.assert_close(module.gradients[:1], expected[:1], rtol=1e-5, atol=1e-7)


def test_a_trainer_that_has_one_keeps_one():
    module = Linear("batch", sum(SIZES))
    make_trainer(StepDenominator(), accumulate_grad_batches=4).fit(module, loader_of(SIZES))
    assert torch.equal(torch.stack(module.gradients), torch.stack(gradients("batch", SIZES, accumulate_grad_batches=4)))


class Stop(Callback):
    def on_train_batch_end(self, trainer, *args):
        raise KeyError("out of memory, say")


def test_an_unfinished_step_does_not_spoil_the_next_fit():
    module, loader = Linear("batch", sum(SIZES)), loader_of(SIZES)
    with pytest.raises(KeyError):
        make_trainer(Stop(), accumulate_grad_batches=4).fit(module, loader)
    module.zero_grad()
    make_trainer(accumulate_grad_batches=4).fit(module, loader)
    torch.testing.assert_close(module.gradients, gradients("batch", [10, 6]), rtol=1e-5, atol=1e-7)


SCALE = 2.0**16  # where torch's GradScaler starts


def scaled_gradient(reduction, weight, dtype, parts):
    """Add up the gradients of some micro-batches as 16-mixed training does, and divide once."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.arange(64) % 3
    layer = torch.nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 8, generator=generator))
        layer.bias.zero_()
    half = dtype == torch.float16
    if not half:
        layer, x = layer.double(), x.double()
    trainer, step, module = make_trainer(accumulate_grad_batches=parts), StepDenominator(), fl.WeightedLossModule()
    for rows in torch.arange(64).split(64 // parts):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            logits = layer(x[rows])
        losses = cross_entropy(logits.float() if half else logits, y[rows], reduction="none")
        weights = torch.full((len(rows),), weight, dtype=losses.dtype)
        module.batch_losses = BatchLosses(None, losses, denominator(losses, weights, reduction))
        loss = SCALE * fl.weighted_loss(losses, weights, reduction) / parts  # as Lightning does
        step.on_before_backward(trainer, module, loss)
        loss.backward()
    step.on_before_optimizer_step(trainer, module, torch.optim.SGD(layer.parameters()))
    return layer.weight.grad.double() / SCALE


@pytest.mark.parametrize(("reduction", "weight"), [("batch", 1.0), ("batch", 1e-6), ("weights", 1e-10)])
@pytest.mark.parametrize("parts", [1, 4, 32])
def test_half_precision_loses_no_more_than_in_one_batch(reduction, weight, parts):
    found, exact = (scaled_gradient(reduction, weight, dtype, parts) for dtype in (torch.float16, torch.float64))
    assert (found - exact).norm() < 0.01 * exact.norm()
