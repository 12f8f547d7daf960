"""Modules that derive from `WeightedLossModule`, through public names alone."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.callbacks.step_denominator import StepDenominator
from flow_lightning.callbacks.stop_on_nan import StopOnNaN
from tests.examples import LinearRegression, RegressionData, fit, regression_data


def test_weighted_loss_is_numpys():
    module = LinearRegression().eval()
    batch = next(iter(DataLoader(fl.IndexedDataset([(torch.ones(4), torch.tensor(0.0))] * 6), 6)))
    losses = torch.rand(6)
    module.sample_weights = fl.SampleWeights.from_losses(torch.rand(6) + 0.1)
    w = module.sample_weights.weights.numpy()
    assert module.weighted_loss(batch, losses).item() == pytest.approx((w * losses.numpy()).sum() / 6)
    module.reduction = "weights"
    assert module.weighted_loss(batch, losses).item() == pytest.approx(np.average(losses.numpy(), weights=w))


def test_a_module_without_sample_losses_says_so():
    with pytest.raises(NotImplementedError, match="sample_losses"):
        fl.WeightedLossModule().sample_losses({})


def test_weights_are_no_part_of_the_model():
    """Weight averaging pairs parameters and buffers by position: the weights must be neither."""
    module = LinearRegression()
    names = set(module.state_dict())
    module.sample_weights = fl.SampleWeights.from_losses(torch.rand(6) + 0.1)
    assert set(module.state_dict()) == names and len(list(module.buffers())) == 3


def gradient_of(module, loss):
    module.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def drawn_gradient(module, batch, seed):
    torch.manual_seed(seed)
    return gradient_of(module, fl.WeightedLossModule.training_step(module, batch, 0))


@pytest.fixture
def sampling():
    """A module without dropout, so that its gradients are those of one function, and a batch."""
    module = LinearRegression().eval()
    module.sample_weights = fl.SampleWeights.from_losses(torch.rand(23, generator=torch.Generator().manual_seed(0)))
    module.log = lambda *args, **kwargs: None
    module.reduction = "sampling"
    return module, next(iter(DataLoader(fl.IndexedDataset(regression_data()), 23)))


def test_sampling_has_the_gradient_of_the_weighted_loss_on_average(sampling):
    module, batch = sampling
    module.reduction = "batch"
    expected = gradient_of(module, module.weighted_loss(batch, module.sample_losses(batch)))
    module.reduction, module.scored = "sampling", 0
    draws = torch.stack([drawn_gradient(module, batch, i) for i in range(1000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-6).all()
    work = module.scored / (len(draws) * 23)
    assert work == pytest.approx(module.sample_weights.weights.mean().item(), abs=0.01)


def test_sampling_leaves_the_stream_of_random_numbers_alone(sampling):
    first = drawn_gradient(*sampling, 3)
    following = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(following, torch.rand(3))
    assert torch.equal(first, drawn_gradient(*sampling, 3))
    assert not torch.equal(first, drawn_gradient(*sampling, 4))


def test_sampling_that_draws_nothing_is_a_step_of_zero(sampling):
    sampling[0].sample_weights.weights.zero_()
    gradient = drawn_gradient(*sampling, 0)
    assert gradient.numel() > 0 and (gradient == 0).all()


def test_each_epoch_draws_other_samples():
    drawn = []

    class Sampled(LinearRegression):
        def sample_losses(self, batch):
            drawn.append(batch.index.tolist())
            return super().sample_losses(batch)

    module, data = Sampled(), RegressionData(batch_size=23, shuffle=False)
    module.reduction = "sampling"
    _, trainer = fit(fl.FlowWeightingCallback(), module=module, data=data, max_epochs=2)
    scored, proof, first, second = drawn
    assert len(scored) == 23 and proof == first != second and trainer.global_step == 2
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.slow
def test_a_compiled_module_has_the_weights_and_the_steps_of_a_plain_one():
    """Traced by torch.compile; the backend that writes machine code needs a compiler."""
    plain, compiled = fl.FlowWeightingCallback(), fl.FlowWeightingCallback()
    expected, module = LinearRegression(), LinearRegression()
    data = RegressionData(regression_data(24))  # batches of one size are traced once
    fit(plain, module=expected, data=data)
    fit(compiled, module=torch.compile(module, backend="eager"), data=data)
    assert torch.equal(compiled.weights.weights, plain.weights.weights)
    assert_same_state(module, expected)


def assert_same_state(module, expected):
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=0)


class Busy(LinearRegression):
    """Has each hook that the library could need for itself, without `super()`."""

    def on_train_start(self):
        self.called = {"train_start"}

    def on_load_checkpoint(self, checkpoint):
        self.was_loaded = True


HOOKS = ["train_batch_start", "before_optimizer_step", "train_epoch_end", "save_checkpoint"]
for hook in HOOKS:
    setattr(Busy, f"on_{hook}", lambda self, *args, hook=hook: self.called.add(hook))


def resumed_fit(make):
    """Two epochs of two batches a step, resumed in the first epoch after 3 of 6 batches."""
    checkpoint = ModelCheckpoint("ckpt", "{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"accumulate_grad_batches": 2, "max_epochs": 2, "enable_checkpointing": True}
    for path in (None, "ckpt/step=1.ckpt"):
        callbacks = [fl.FlowWeightingCallback(), fl.ExactResumeCallback(), checkpoint]
        module, _ = fit(*callbacks, module=make(), ckpt_path=path, **settings)
    return module


def test_all_hooks_are_free_for_the_user():
    """The weights, the denominators and the resumed fit of a module without hooks."""
    module, expected = resumed_fit(Busy), resumed_fit(LinearRegression)
    assert module.called == {"train_start", *HOOKS} and module.was_loaded
    assert_same_state(module, expected)


def test_a_module_with_hooks_of_its_own_stops_at_a_nan():
    class BusyAndBroken(Busy):
        def sample_losses(self, batch):
            return super().sample_losses(batch) * (torch.nan if self.training else 1.0)

    with pytest.raises(FloatingPointError, match="at batch 0, for the samples"):
        fit(module=BusyAndBroken())


class Mixin:
    def on_load_checkpoint(self, checkpoint):
        self.was_loaded = True


class Mixed(Mixin, LinearRegression):
    pass


@pytest.mark.parametrize("make", [LinearRegression, Busy, Mixed])
def test_a_loaded_module_knows_the_reference_of_its_checkpoint(make):
    flow = fl.FlowWeightingCallback()
    _, trainer = fit(flow, module=make())
    trainer.save_checkpoint("one.ckpt")
    module = make.load_from_checkpoint("one.ckpt")
    assert module.flow_reference == flow.weights.fingerprint["reference"] != ""
    assert getattr(module, "was_loaded", False) == (make is not LinearRegression)


def test_callbacks_of_the_users_own_join_those_of_the_module():
    class Joined(LinearRegression):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), LearningRateMonitor()]

    _, trainer = fit(module=Joined(), logger=True, default_root_dir="run")
    kinds = {type(callback) for callback in trainer.callbacks}
    assert {StopOnNaN, StepDenominator, LearningRateMonitor} <= kinds
