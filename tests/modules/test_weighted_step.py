"""Unchanged modules: their weighted steps against loops written by hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flow_lightning as fl
from tests.unchanged import CASES, Case, Classifier, data, fit


def by_hand(case: Case, weights: Tensor, dataset: Any, epochs: int = 2) -> Classifier:
    """Train the same module by a plain loop, each loss weighted by hand."""
    module = Classifier(case.loss, case.outputs)
    optimizer = module.configure_optimizers()
    torch.manual_seed(2)
    for _ in range(epochs):
        for start in range(0, len(dataset), 5):
            index = torch.arange(start, min(start + 5, len(dataset)))
            x, y = dataset[index.tolist()]
            logits = module.net(x)
            if case.weighted is not None:
                loss = case.weighted(logits, y, weights[index])
            else:
                loss = (weights[index] * case.losses(logits, y)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module


@pytest.mark.parametrize("name", CASES)
def test_losses_and_steps_are_those_of_a_loop_by_hand(name: str) -> None:
    case = CASES[name]
    dataset = data(case)
    module = Classifier(case.loss, case.outputs)
    with torch.no_grad():
        x, y = dataset.tensors
        expected = case.losses(copy.deepcopy(module).eval().net(x), y)
    flow = fl.FlowWeightingCallback()
    fit(module, dataset, flow)
    torch.testing.assert_close(flow.weights.losses, expected, rtol=1e-5, atol=1e-7)
    by_loop = by_hand(case, flow.weights.weights, dataset)
    torch.testing.assert_close(module.state_dict(), by_loop.state_dict(), rtol=1e-5, atol=1e-6)


class Manual(Classifier):
    """Manual optimisation with a closure-free step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        optimizer.step()


class Dictionary(Classifier):
    """A step with one argument that returns a dict."""

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.loss(self.net(batch[0]), batch[1]), "other": torch.zeros(())}


class Method(Classifier):
    """The two-line way: a home-made loss in a method that training_step calls."""

    def sample_losses(self, batch: Any) -> Tensor:
        return -self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.sample_losses(batch).mean()


class Skipping(Classifier):
    """The first batch of the fit has no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.training and self.trainer.global_step == 0 and not self.seen:
            self.seen.append(0.0)
            return None
        return self.loss(self.net(batch[0]), batch[1])


def losses_by_hand(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Manual, {}), (Dictionary, {}), (Method, {}), (Classifier, {"sample_losses": losses_by_hand})],
)
def test_steps_of_other_forms_are_weighted_alike(kind: Any, settings: Any) -> None:
    dataset, module, flow = data(), kind(), fl.FlowWeightingCallback(**settings)
    fit(module, dataset, flow)
    by_loop = by_hand(CASES["cross_entropy"], flow.weights.weights, dataset)
    torch.testing.assert_close(module.state_dict(), by_loop.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_step_without_a_loss_is_skipped() -> None:
    flow = fl.FlowWeightingCallback()
    trainer = fit(Skipping(), data(), flow)
    assert trainer.global_step == flow.weights.lookups == 2 * 5


def test_a_module_is_after_the_fit_what_it_would_be_without_the_callback() -> None:
    class Ones(fl.FlowWeightingCallback):
        def _weights_from(self, *args: Any) -> Any:
            weights = super()._weights_from(*args)
            weights.weights.fill_(1.0)
            return weights

    plain, weighted = Classifier(), Classifier()
    fit(plain, data())
    trainer = fit(weighted, data(), Ones())
    assert vars(weighted).keys() == vars(plain).keys()
    assert weighted.training_step.__func__ is Classifier.training_step
    assert weighted.seen == pytest.approx(plain.seen, rel=1e-5), "scoring and proof leave nothing in its list"
    torch.testing.assert_close(weighted.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    assert trainer.strategy.process_dataloader.__func__ is type(trainer.strategy).process_dataloader


class Focal(Classifier):
    """A loss in plain tensor operations."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logs = self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None])
        return -((1 - logs.exp()) ** 2 * logs).mean()


class NonLinear(Classifier):
    """A focal loss on top of torch's own cross-entropy: linear in nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class Teacher(Classifier):
    """Moves parameters in its step, as averaged teachers do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net[0].bias.mul_(0.9)
        return super().training_step(batch, batch_idx)


class Unbatched(Classifier):
    """Leaves out a sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0])[1:], batch[1][1:])


class Stirring(Classifier):
    """Draws noise from a generator of its own, which nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.rand(len(batch[0]), 4, generator=self.generator) if self.training else 0
        return F.cross_entropy(self.net(batch[0] + noise), batch[1])


class Later(Classifier):
    """Takes up a home-made loss in the third step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step < 2:
            return F.cross_entropy(self.net(batch[0]), batch[1])
        return -self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()


class Shrinking(Classifier):
    """Leaves out a sample in the third step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        start = int(self.trainer.global_step >= 2)
        return F.cross_entropy(self.net(batch[0][start:]), batch[1][start:])


@pytest.mark.parametrize(
    ("kind", "message"), [(Later, "in this batch, .*none is part"), (Shrinking, r"in this batch, .*5 samples.*\[4\]")]
)
def test_a_later_batch_that_cannot_be_weighted_is_refused_too(kind: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(kind(), data(), fl.FlowWeightingCallback())


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Focal, ValueError, r"losses that were seen \(none\).*sample_losses=lambda"),
        (NonLinear, RuntimeError, r"with weights of 1, .* with 0 and .* with 1/2: its loss is no weighted mean"),
        (Teacher, RuntimeError, r"changes parameters by itself \(net.0.bias\)"),
        (Unbatched, ValueError, r"The batch has 5 samples, but its losses are cross_entropy of shape \[4\]"),
        (Stirring, RuntimeError, "with weights of 1, but .* without"),
    ],
)
def test_what_cannot_be_weighted_is_refused_by_name_and_nothing_trained(kind: Any, error: Any, message: str) -> None:
    module = kind()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        fit(module, data(), fl.FlowWeightingCallback())
    if kind is not Teacher:
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


class Penalised(Classifier):
    """A second loss of samples, and a penalty that has no samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        penalty = 0.1 * self.net[0].weight.square().sum()
        return F.cross_entropy(out, batch[1]) + F.mse_loss(out, torch.zeros_like(out)) + penalty


def test_a_penalty_is_left_alone_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module = Penalised()
    fit(module, data(), fl.FlowWeightingCallback())
    penalty = 0.1 * Classifier().net[0].weight.square().sum().item()
    said = [record.message for record in caplog.records if "has no loss per sample" in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"FLOW: {penalty:.3g} of the first batch's loss")


def test_one_loss_can_be_named() -> None:
    flow, module, dataset = fl.FlowWeightingCallback(loss="mse_loss"), Penalised(), data()
    with torch.no_grad():
        expected = copy.deepcopy(module).eval().net(dataset.tensors[0]).square().mean(1)
    fit(module, dataset, flow)
    torch.testing.assert_close(flow.weights.losses, expected)
    with pytest.raises(ValueError, match=r"name of a loss of torch\.nn\.functional"):
        fl.FlowWeightingCallback(loss="crossentropy")


def test_a_first_batch_whose_loss_is_zero_leaves_the_proof_to_the_next_one() -> None:
    case = Case(lambda x, y: F.mse_loss(x * y, 0 * x), lambda x, y: (x * y).square().mean(1), CASES["mse"].targets)
    dataset = data(case)
    dataset.tensors[1][:5] = 0
    flow, module = fl.FlowWeightingCallback(), Classifier(case.loss)
    fit(module, dataset, flow)
    expected = by_hand(case, flow.weights.weights, dataset)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_losses_may_be_masked_in_place() -> None:
    def masked(logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none")
        losses *= targets != 0
        return losses.mean()

    flow, dataset = fl.FlowWeightingCallback(), data()
    fit(Classifier(masked), dataset, flow)
    assert torch.equal(flow.weights.losses == 0, dataset.tensors[1] == 0)


def test_views_that_are_made_in_training_alone_are_refused() -> None:
    class TwoViews(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            if self.training:
                x, y = torch.cat([x, x + 0.1]), torch.cat([y, y])
            return super().training_step((x, y), batch_idx)

    with pytest.raises(RuntimeError, match="2 rows for each sample in training, but of 1 in evaluation"):
        fit(TwoViews(), data(), fl.FlowWeightingCallback())


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_checkpoints_of_activations_change_nothing(is_reentrant: bool) -> None:
    class Activations(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = checkpoint(self.net[2:], self.net[:2](batch[0]), use_reentrant=is_reentrant)
            return F.cross_entropy(logits, batch[1])

    plain, module, flow = Classifier(), Activations(), fl.FlowWeightingCallback()
    fit(plain, data(), fl.FlowWeightingCallback())
    fit(module, data(), flow)
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
