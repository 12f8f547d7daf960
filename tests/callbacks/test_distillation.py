"""The change of answers and features as a term of the loss, against the same term in a loss by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

import flow_lightning as fl
from flow_lightning.callbacks.distillation import DistillationCallback
from tests import examples, unchanged
from tests.images import PictureData, tiny_module
from tests.language import language_module
from tests.refusals import assert_refused
from tests.unchanged import Classifier

STRENGTH = {"answers": 3.0, "features": 0.7}


def change_by_hand(module, start, images, of):
    """Return the mean change from a model before training; cross-entropy less entropy is the KL divergence."""
    now, before = (
        model.forward_head(model.forward_features(images), pre_logits=True) for model in (module.model, start)
    )
    if of == "features":
        return torch.stack([((a - b.detach()) ** 2).sum() for a, b in zip(now, before)]).mean()
    answers, others = (F.linear(x, start.fc.weight, start.fc.bias).double() / 2 for x in (now, before))
    soft = others.softmax(1).detach()
    return (F.cross_entropy(answers, soft) - torch.distributions.Categorical(soft).entropy().mean()).float()


class ByHand(fl.ImageClassificationModule):
    def training_step(self, batch, batch_idx):
        change = change_by_hand(self, self.start, batch["image"], self.of)
        return super().training_step(batch, batch_idx) + STRENGTH[self.of] * change


def image_module(kind=fl.ImageClassificationModule, of="answers", **settings):
    pretrained = copy.deepcopy(tiny_module().model)  # with a head of three classes, as any pre-trained model
    torch.nn.init.normal_(pretrained.fc.weight)
    torch.manual_seed(1)
    module = kind(copy.deepcopy(pretrained), 3, learning_rate=0.05, **settings)
    # Not a submodule: it has no part in parameters and checkpoints.
    vars(module).update(start=pretrained.eval().requires_grad_(False), of=of)
    return module


@pytest.mark.parametrize("of", STRENGTH)
def test_a_fit_of_an_image_classifier_is_that_with_the_term_in_the_loss(of):
    held, by_hand, plain = image_module(), image_module(ByHand, of), image_module()
    examples.fit(DistillationCallback(strength=STRENGTH[of], of=of), module=held, data=PictureData(), max_epochs=2)
    examples.fit(module=by_hand, data=PictureData(), max_epochs=2)
    examples.fit(module=plain, data=PictureData(), max_epochs=2)
    torch.testing.assert_close(held.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-5)
    assert (held.model.conv1[0].weight - plain.model.conv1[0].weight).abs().max() > 1e-3
    assert "training_step" not in vars(held) and not held.head._forward_pre_hooks


@pytest.mark.parametrize("weighted", [False, True])
def test_the_features_of_an_unchanged_module_are_those_of_its_own_step(weighted):
    class Parted(Classifier):
        head = property(lambda self: self.net[4])

        def features(self, batch):
            return self.net[:4](batch[0])

    class WithTerm(Parted):
        def training_step(self, batch, batch_idx):
            features, y = self.features(batch), batch[1]
            losses = F.cross_entropy(self.head(features), y, reduction="none")
            with torch.no_grad():
                before = self.start.features(batch)
            return (losses * self.weights_of(batch)).mean() + 0.3 * (features - before).square().sum(1).mean()

        def weights_of(self, batch):
            rows = [(self.x == row).all(1).nonzero().item() for row in batch[0]]
            return torch.ones(len(rows)) if self.weights is None else self.weights[rows]

    held, by_hand, flow, dataset = Parted(), WithTerm(), fl.FlowWeightingCallback(), unchanged.data()
    start = copy.deepcopy(by_hand).eval()
    unchanged.fit(held, dataset, *[flow] * weighted, DistillationCallback(strength=0.3, of="features"))
    vars(by_hand).update(start=start, x=dataset.tensors[0], weights=flow.weights.weights if weighted else None)
    unchanged.fit(by_hand, dataset)
    torch.testing.assert_close(held.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_step_of_accumulated_micro_batches_is_that_of_one_batch():
    ends = []
    for size, parts in ((12, 1), (4, 3)):
        module = image_module(optimizer=lambda p: torch.optim.SGD(p), schedule="constant")
        data = PictureData(20, batch_size=size, shuffle=False)  # 20: the last step has fewer samples
        callbacks = [fl.FlowWeightingCallback(), DistillationCallback(strength=2.0)]
        examples.fit(*callbacks, module=module, data=data, accumulate_grad_batches=parts)
        ends.append(module.state_dict())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_a_resumed_fit_ends_as_an_unbroken_one_and_needs_the_same_pretrained_weights():
    def once(path, *others, module=None, **settings):
        keep, module = ModelCheckpoint("c", "{epoch}", save_top_k=-1), module or image_module(schedule="constant")
        settings = {"max_epochs": 2, "ckpt_path": path, "enable_checkpointing": True} | settings
        examples.fit(keep, *others, module=module, data=PictureData(shuffle=False), **settings)
        return module.state_dict()

    unbroken = once(None, DistillationCallback())
    torch.testing.assert_close(once("c/epoch=0.ckpt", DistillationCallback()), unbroken, rtol=0, atol=0)
    other = image_module()
    torch.nn.init.constant_(other.model.conv1[0].weight, 0.1)
    with pytest.raises(ValueError, match=r"not the pre-trained one .*model\.conv1\.0\.weight differs"):
        once("c/epoch=0.ckpt", DistillationCallback(), module=other)
    once(None, max_epochs=1)
    with pytest.raises(RuntimeError, match="written without DistillationCallback"):
        once("c/epoch=0-v1.ckpt", DistillationCallback())


def test_a_step_on_other_samples_than_those_of_its_batch_is_refused():
    with pytest.raises(RuntimeError, match=r"without reduction='sampling'"):
        callbacks = [fl.FlowWeightingCallback(), DistillationCallback()]
        examples.fit(*callbacks, module=image_module(reduction="sampling"), data=PictureData())


def test_a_module_without_the_parts_is_refused():
    with pytest.raises(TypeError, match=r"needs features\(batch\) -> \[B, D\] and a head and a pretrained_head"):
        unchanged.fit(language_module(), unchanged.data(), DistillationCallback())


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"temperature": -1.0}, {"of": "all"}])
def test_a_wrong_argument_is_refused(settings):
    assert_refused(DistillationCallback, settings)
