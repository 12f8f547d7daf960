"""The pull to the pre-trained weights against the same penalty in the loss, by hand."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

import flow_lightning as fl
from flow_lightning.callbacks.stay_near import StayNearCallback
from tests import examples, unchanged
from tests.images import PictureData, tiny_module
from tests.language import language_module
from tests.refusals import assert_refused
from tests.unchanged import Classifier

PENALTIES = {"l2": lambda change: 0.5 * change.square().sum(), "l1": lambda change: change.abs().sum()}


def penalty(module, start, norm, is_new):
    """Return 0.3 times the penalty on the way from the start, of all parameters but the new ones."""
    pairs = zip(module.named_parameters(), start)
    return 0.3 * sum(PENALTIES[norm]((p - p0).float()) for (name, p), p0 in pairs if not is_new(name))


def values_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


class ByHand(Classifier):
    """Has the penalty in its loss, once a micro-batch, so that the mean of a step has it once."""

    def __init__(self, norm, is_new, optimizer=None):
        super().__init__()
        self.norm, self.is_new, self.start, self.optimizer = norm, is_new, values_of(self), optimizer

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + penalty(self, self.start, self.norm, self.is_new)

    def configure_optimizers(self):
        return self.optimizer(self.parameters()) if self.optimizer else super().configure_optimizers()


class Plain(ByHand):
    def training_step(self, batch, batch_idx):
        return Classifier.training_step(self, batch, batch_idx)


@pytest.mark.parametrize(
    ("norm", "settings"),
    [("l2", {}), ("l1", {}), ("l2", {"accumulate_grad_batches": 2}), ("l1", {"gradient_clip_val": 0.5})],
)
def test_a_fit_of_an_unchanged_module_is_that_with_the_penalty_in_the_loss(norm, settings):
    held, by_hand, plain = Classifier(), ByHand(norm, lambda name: name.startswith("net.4")), Classifier()
    unchanged.fit(
        held, unchanged.data(n=20), StayNearCallback(strength=0.3, norm=norm, new_parts=["net.4"]), **settings
    )
    unchanged.fit(by_hand, unchanged.data(n=20), **settings)
    unchanged.fit(plain, unchanged.data(n=20), **settings)
    torch.testing.assert_close(values_of(held), values_of(by_hand), rtol=1e-6, atol=1e-6)
    assert (plain.net[0].weight - held.net[0].weight).abs().max() > 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_half_precision_leaves_the_penalty_as_it_is(fused):
    ends = []
    for module, callbacks in ((Plain, [StayNearCallback(strength=0.3)]), (ByHand, [])):
        module = module("l2", lambda name: False, lambda p: torch.optim.SGD(p, lr=0.1, fused=fused))
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        unchanged.fit(module, unchanged.data(), *callbacks, plugins=[precision])
        ends.append(values_of(module))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_a_fit_of_an_image_classifier_is_that_with_the_penalty_in_the_loss_and_its_head_is_free():
    class Penalised(fl.ImageClassificationModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + penalty(self, self.start, "l2", lambda name: name.startswith("model.fc."))

    ends = []
    for kind, callbacks in ((fl.ImageClassificationModule, [StayNearCallback(strength=0.3)]), (Penalised, [])):
        module = tiny_module(kind=kind, optimizer=lambda p: torch.optim.SGD(p), learning_rate=0.05)
        module.start = values_of(module)
        examples.fit(*callbacks, module=module, data=PictureData(24, batch_size=8), max_epochs=2)
        ends.append(values_of(module))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_under_accumulation_the_penalty_of_an_image_classifier_counts_once_a_step():
    module = tiny_module(optimizer=lambda p: torch.optim.SGD(p), schedule="constant", learning_rate=0.1)
    moved = copy.deepcopy(module)
    settings = {"data": PictureData(24, batch_size=8), "accumulate_grad_batches": 3, "max_epochs": 2}
    examples.fit(StayNearCallback(strength=0.3), module=module, **settings)

    class Watch(examples.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % 3 == 0:  # a step by hand: what a plain step did, and the pull
                with torch.no_grad():
                    for (name, p), p0, now in zip(pl_module.named_parameters(), start, before[-1]):
                        p.sub_(0.1 * 0.3 * (now - p0) * (not name.startswith("model.fc.")))
                before.append(values_of(pl_module))

    start = values_of(moved)
    before = [start]
    examples.fit(Watch(), module=moved, **settings)
    assert len(before) == 3
    torch.testing.assert_close(values_of(module), values_of(moved), rtol=1e-5, atol=1e-6)


def test_a_probed_head_of_an_unchanged_module_is_free():
    held, free = Classifier(), Classifier()
    unchanged.fit(held, unchanged.data(), fl.LinearProbeCallback(), StayNearCallback(strength=5.0))
    callbacks = [fl.LinearProbeCallback(), StayNearCallback(strength=5.0, new_parts=["net.4"])]
    unchanged.fit(free, unchanged.data(), *callbacks)
    torch.testing.assert_close(values_of(held), values_of(free), rtol=0, atol=0)


def test_a_resumed_fit_ends_as_an_unbroken_one_and_needs_the_same_pretrained_weights():
    def once(path, *others, module=None, **settings):
        keep, module = ModelCheckpoint("c", "{epoch}", save_top_k=-1), module or Classifier()
        settings = {"ckpt_path": path, "enable_checkpointing": True} | settings
        unchanged.fit(module, unchanged.data(), fl.ExactResumeCallback(), keep, *others, **settings)
        return values_of(module)

    unbroken, resumed = (once(path, StayNearCallback(strength=0.3)) for path in (None, "c/epoch=0.ckpt"))
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)
    other = Classifier()
    torch.nn.init.constant_(other.net[0].weight, 0.1)
    with pytest.raises(ValueError, match=r"not the pre-trained one .*net\.0\.weight differs"):
        once("c/epoch=0.ckpt", StayNearCallback(strength=0.3), module=other)
    once(None, max_epochs=1)
    with pytest.raises(RuntimeError, match="written without StayNearCallback"):
        once("c/epoch=0-v1.ckpt", StayNearCallback(strength=0.3))


def test_layers_that_are_unfrozen_later_are_held_to_their_pretrained_values():
    class WithBackbone(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone = self.net[:2]

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    moved = []
    for strength in (0.0, 3.0):
        module = WithBackbone()
        start = module.net[0].weight.detach().clone()
        unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.1, verbose=False)
        unchanged.fit(module, unchanged.data(), unfreezing, StayNearCallback(strength=strength), max_epochs=4)
        moved.append((module.net[0].weight - start).norm().item())
    assert 0 < moved[1] < 0.5 * moved[0]


def test_adapters_leave_nothing_to_hold():
    module = language_module(tune="lora", lora_r=2)
    loader = torch.utils.data.DataLoader([{"input_ids": torch.arange(8), "labels": torch.arange(8), "index": 0}])
    message = (
        "No trained parameter of CausalLanguageModule is pre-trained, so StayNearCallback has nothing to hold on to"
    )
    with pytest.raises(ValueError, match=message):
        unchanged.fit(module, None, StayNearCallback(), loader=loader)


@pytest.mark.parametrize("settings", [{"strength": -1.0}, {"strength": float("nan")}, {"norm": "l3"}])
def test_a_wrong_argument_is_refused(settings):
    assert_refused(StayNearCallback, settings)
