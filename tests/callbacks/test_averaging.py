"""Averages with the pre-trained weights during a fit, against the paper's formula in a hook by hand."""

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

import flow_lightning as fl
from flow_lightning.callbacks.averaging import SequentialAveragingCallback
from tests import examples, unchanged
from tests.images import PictureData, tiny_module
from tests.refusals import assert_refused
from tests.unchanged import Classifier


def values_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class ByHand(Callback):
    """Averages after the steps of these numbers, all parameters but those of the new head."""

    def __init__(self, module, weight, steps, head="net.4"):
        self.start, self.weight, self.steps, self.head = values_of(module), weight, [*steps], head

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            self.steps.remove(trainer.global_step)
            for name, value in pl_module.named_parameters():
                if not name.startswith(self.head):
                    value.data = (1 - self.weight) * value.data + self.weight * self.start[name]


@pytest.mark.parametrize(
    ("flow", "settings", "steps"),
    [
        (False, {}, [3, 6, 9, 10]),
        (True, {"accumulate_grad_batches": 2}, [2, 4, 6]),
        (True, {"max_steps": 7}, [2, 4, 6, 7]),
    ],
)
def test_weights_are_averaged_after_each_interval_and_at_the_end(flow, settings, steps):
    averaged, by_hand, plain, dataset = Classifier(), Classifier(), Classifier(), unchanged.data()
    weights = [fl.FlowWeightingCallback()] * flow
    companion = SequentialAveragingCallback(weight=0.4, every=0.3, new_parts=["net.4"])
    unchanged.fit(averaged, dataset, *weights, companion, **settings)
    unchanged.fit(by_hand, dataset, *weights, ByHand(by_hand, 0.4, steps), **settings)
    unchanged.fit(plain, dataset, *weights, **settings)
    torch.testing.assert_close(values_of(averaged), values_of(by_hand), rtol=1e-6, atol=1e-7)
    assert (averaged.net[0].weight - plain.net[0].weight).abs().max() > 1e-3


def test_the_head_of_an_image_classifier_is_free_and_a_weight_of_one_leaves_the_pretrained_body():
    module, plain = tiny_module(learning_rate=0.05), tiny_module(learning_rate=0.05)
    start = values_of(module)
    examples.fit(SequentialAveragingCallback(weight=1.0, every=1.0), module=module, data=PictureData())
    examples.fit(module=plain, data=PictureData())
    body = {name: value for name, value in start.items() if not name.startswith("model.fc.")}
    torch.testing.assert_close({name: values_of(module)[name] for name in body}, body, rtol=0, atol=0)
    torch.testing.assert_close(module.head.state_dict(), plain.head.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_the_mean_over_the_steps_is_that_of_averaged_weights(order):
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(pl_module.net[0].weight.detach().clone())

    module, watch = Classifier(), Watch()
    companion = SequentialAveragingCallback(weight=0.9, every=0.2)
    callbacks = [companion, WeightAveraging(device="cpu")][::order]
    unchanged.fit(module, unchanged.data(), *callbacks, watch)
    torch.testing.assert_close(module.net[0].weight, torch.stack(watch.seen).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_fit_ends_as_an_unbroken_one(step):
    def once(path, module, *others):
        keep = ModelCheckpoint("c", "{step}", save_top_k=-1, every_n_train_steps=1)
        settings = {"ckpt_path": path, "enable_checkpointing": True, "accumulate_grad_batches": 2, "max_epochs": 3}
        unchanged.fit(module, unchanged.data(), fl.ExactResumeCallback(), keep, *others, **settings)
        return values_of(module)

    unbroken, resumed = (
        once(path, Classifier(), SequentialAveragingCallback(weight=0.4, every=0.3, new_parts=["net.4"]))
        for path in (None, f"c/step={step}.ckpt")
    )
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)


def test_a_fit_that_is_stopped_early_is_averaged_once_more():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 4

    averaged, by_hand = Classifier(), Classifier()
    companion = SequentialAveragingCallback(weight=0.4, every=0.5, new_parts=["net.4"])
    unchanged.fit(averaged, unchanged.data(), Stop(), companion)
    unchanged.fit(by_hand, unchanged.data(), Stop(), ByHand(by_hand, 0.4, [4]))
    torch.testing.assert_close(values_of(averaged), values_of(by_hand), rtol=1e-6, atol=1e-7)


def test_a_fit_without_a_known_end_is_refused():
    with pytest.raises(ValueError, match="Set max_epochs or max_steps"):
        unchanged.fit(Classifier(), unchanged.data(), SequentialAveragingCallback(), max_epochs=-1)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"every": 1.5}])
def test_a_wrong_argument_is_refused(settings):
    assert_refused(SequentialAveragingCallback, settings)
