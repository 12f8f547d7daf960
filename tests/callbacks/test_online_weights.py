"""Online weights in fits, of modules of this library and of any other, against the loss that they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.callbacks.online_weights import LossAdaptiveRateCallback, OnlineWeightsCallback
from flow_lightning.method.online import RULES, entropy_gate
from tests import examples, unchanged
from tests.images import PictureData, tiny_module
from tests.language import language_module
from tests.refusals import assert_refused
from tests.unchanged import Classifier


def generalised(logits, targets, power=0.7):
    p = logits.softmax(1).gather(1, targets[:, None])
    return ((1 - p**power) / power).mean()


def test_a_fit_of_an_unchanged_module_is_that_of_generalised_cross_entropy():
    weighted, by_hand = Classifier(), Classifier(generalised)
    unchanged.fit(weighted, unchanged.data(), OnlineWeightsCallback(value=0.7))
    unchanged.fit(by_hand, unchanged.data())
    torch.testing.assert_close(weighted.state_dict(), by_hand.state_dict())
    assert "training_step" not in vars(weighted)


def test_a_fit_of_an_image_classifier_is_that_of_generalised_cross_entropy():
    class ByHand(fl.ImageClassificationModule):
        def weighted_loss(self, batch, losses):
            return generalised(self(batch["image"]), batch["target"])

    weighted, by_hand = (tiny_module(kind=kind, learning_rate=0.05) for kind in (fl.ImageClassificationModule, ByHand))
    examples.fit(OnlineWeightsCallback(value=0.7), module=weighted, data=PictureData())
    examples.fit(module=by_hand, data=PictureData())
    torch.testing.assert_close(weighted.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-6)
    assert weighted.online_weights is None


@pytest.mark.parametrize("order", [1, -1])
def test_flow_and_online_weights_multiply(order):
    class Watched(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.gradients = [parameter.grad.clone() for parameter in self.parameters()]

    module, dataset = Watched(), unchanged.data()
    module.net[3].p = 0.0
    start, flow = copy.deepcopy(module), fl.FlowWeightingCallback()
    callbacks = [flow, OnlineWeightsCallback()][::order]
    unchanged.fit(module, dataset, *callbacks, loader=DataLoader(dataset, 23), max_epochs=1)
    x, y = dataset.tensors
    losses = F.cross_entropy(start.train().net(x), y, reduction="none")
    (flow.weights.weights * torch.exp(-losses.detach()) * losses).mean().backward()
    torch.testing.assert_close(module.gradients, [parameter.grad for parameter in start.parameters()])
    assert not {"training_step", "online_weights"} & set(vars(module))


def test_ignored_tokens_of_an_unchanged_module_are_no_small_losses():
    case = unchanged.CASES["tokens"]

    def kept(logits, targets):
        losses = F.cross_entropy(logits.view(-1, unchanged.CLASSES), targets.flatten(), reduction="none")
        own = targets.flatten() != -100
        chosen = losses[own].sort().values[: round(0.5 * int(own.sum()))]
        return chosen.sum() / own.sum()

    weighted, by_hand = Classifier(case.loss, case.outputs), Classifier(kept, case.outputs)
    unchanged.fit(weighted, unchanged.data(case), OnlineWeightsCallback(rule="smallest", value=0.5))
    unchanged.fit(by_hand, unchanged.data(case))
    torch.testing.assert_close(weighted.state_dict(), by_hand.state_dict())


def test_the_gate_of_an_unchanged_module_sees_its_logits():
    def gated(logits, targets):
        return (entropy_gate(logits) * F.cross_entropy(logits.double(), targets, reduction="none")).mean().float()

    weighted, by_hand = Classifier(), Classifier(gated)
    unchanged.fit(weighted, unchanged.data(), OnlineWeightsCallback(rule="entropy"))
    unchanged.fit(by_hand, unchanged.data())
    torch.testing.assert_close(weighted.state_dict(), by_hand.state_dict())


@pytest.mark.parametrize("rule", [*RULES, "entropy"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tokens_of_a_language_model_are_weighted_by_every_rule(rule, softcap):
    module, ids = language_module(chunk_tokens=4), torch.arange(40).view(4, 10) * 7 % 300
    module.causal_lm.config.final_logit_softcapping = softcap
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) < torch.arange(2, 6)[:, None], -100)}
    callback = OnlineWeightsCallback(rule=rule)
    callback.on_train_start(None, module)
    with callback.around(None, module, batch):
        loss = module.weighted_loss(batch, module.training_losses(batch))
    supervised = batch["labels"][:, 1:] != -100
    logits = module(batch["input_ids"])[:, :-1][supervised]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, batch["labels"][:, 1:][supervised], reduction="none")
    factors = entropy_gate(logits) if rule == "entropy" else RULES[rule](losses.detach())
    torch.testing.assert_close(loss, (factors * losses).mean(), rtol=1e-4, atol=1e-5)
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad((factors * losses).mean(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_the_step_of_accumulated_micro_batches_is_that_of_one_batch(accumulate):
    ends = []
    for size, parts in ((4 * accumulate, 1), (4, accumulate)):
        module = tiny_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), schedule="constant")
        callbacks = [fl.FlowWeightingCallback(), OnlineWeightsCallback()]
        data = PictureData(24, batch_size=size, shuffle=False)
        examples.fit(*callbacks, module=module, data=data, accumulate_grad_batches=parts)
        ends.append(module.state_dict())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_the_rate_follows_the_running_loss_and_the_schedule_keeps_its_own():
    rates, losses = [], []

    class Watched(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def on_train_start(self):  # behind the callback's own hook
            self.trainer.optimizers[0].register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    callback = LossAdaptiveRateCallback(decay=0.5, most=9.0)
    module = Watched()
    unchanged.fit(module, unchanged.data(), callback)
    running, expected = losses[0], []
    for step, loss in enumerate(losses):
        own = 0.1 * 0.5 ** (step // 5)
        expected += [own, own * (1 if step == 0 else (losses[0] / running) ** 0.5)]
        running = 0.5 * running + 0.5 * loss
    assert rates == pytest.approx(expected, rel=1e-5)
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


WRONG = [{"rule": "prob"}, {"rule": "smallest", "value": 1.5}, {"value": 0.0}, {"loss": "crossentropy"}]


@pytest.mark.parametrize("settings", WRONG)
def test_a_wrong_argument_is_refused(settings):
    assert_refused(OnlineWeightsCallback, settings)


def test_a_wrong_bound_of_the_rate_is_refused():
    with pytest.raises(ValueError, match=r"most 0\.5"):
        LossAdaptiveRateCallback(most=0.5)


def test_a_step_without_that_loss_is_refused():
    with pytest.raises(RuntimeError, match="has no cross_entropy to weigh"):
        unchanged.fit(Classifier(F.mse_loss), unchanged.data(unchanged.CASES["mse"]), OnlineWeightsCallback())
    with pytest.raises(RuntimeError, match="logits of 0 were seen"):
        examples.fit(OnlineWeightsCallback(rule="entropy"))


def test_a_module_that_leaves_the_weights_out_is_refused():
    class Unweighted(examples.LinearRegression):
        def training_step(self, batch, batch_idx):
            return self.sample_losses(batch).mean()

    with pytest.raises(RuntimeError, match=r"Unweighted\.training_step does not call weighted_loss"):
        examples.fit(OnlineWeightsCallback(), module=Unweighted())
