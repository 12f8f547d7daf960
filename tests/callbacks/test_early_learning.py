"""Early-learning regularisation in fits, against the paper's formula written into the loss by hand."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.callbacks.early_learning import EarlyLearningCallback
from tests import examples, unchanged
from tests.examples import slow
from tests.images import PictureData, tiny_module
from tests.language import language_data, language_module
from tests.refusals import assert_refused
from tests.unchanged import Classifier

SIZES = [3, 1, 4, 2, 5, 1]  # samples of the batches, by turns of two processes


def regulariser(targets, index, logits, strength=3.0, momentum=0.7):
    """Update `targets`, by sample, and return the term of a batch."""
    values = []
    for i, row in zip(index.tolist(), logits):
        p = row.exp() / row.exp().sum()
        targets[i] = momentum * targets.get(i, 0) + (1 - momentum) * p.detach()
        values.append((1 - targets[i] @ p).log())
    return strength * sum(values) / len(values)


class ImagesByHand(fl.ImageClassificationModule):
    def training_step(self, batch, batch_idx):
        loss, targets = super().training_step(batch, batch_idx), vars(self).setdefault("targets", {})
        return loss + regulariser(targets, batch["index"], self(batch["image"]))


@pytest.mark.parametrize("flow", [slow(False), True])
def test_a_fit_of_an_image_classifier_is_that_with_the_term_in_the_loss(flow):
    kinds = fl.ImageClassificationModule, ImagesByHand, fl.ImageClassificationModule
    held, by_hand, plain = (tiny_module(kind=kind, learning_rate=0.05) for kind in kinds)
    weights = [fl.FlowWeightingCallback()] * flow
    examples.fit(*weights, EarlyLearningCallback(), module=held, data=PictureData(), max_epochs=3)
    examples.fit(*weights, module=by_hand, data=PictureData(), max_epochs=3)
    examples.fit(*weights, module=plain, data=PictureData(), max_epochs=3)
    torch.testing.assert_close(held.state_dict(), by_hand.state_dict(), rtol=1e-3, atol=1e-5)
    assert (held.head.weight - plain.head.weight).abs().max() > 1e-3
    assert "training_step" not in vars(held)


def test_in_an_unchanged_module_flow_tells_the_samples_of_a_batch():
    class ByHand(Classifier):
        def training_step(self, batch, batch_idx):
            (x, y), targets = batch, vars(self).setdefault("targets", {})
            index = torch.tensor([(self.x == row).all(1).nonzero().item() for row in x])
            logits = self.net(x)
            losses = self.weights[index] * F.cross_entropy(logits, y, reduction="none")
            return losses.mean() + regulariser(targets, index, logits, 2.0, 0.5)

    held, by_hand, flow, dataset = Classifier(), ByHand(), fl.FlowWeightingCallback(), unchanged.data()
    unchanged.fit(held, dataset, flow, EarlyLearningCallback(strength=2.0, momentum=0.5))
    vars(by_hand).update(x=dataset.tensors[0], weights=flow.weights.weights)
    unchanged.fit(by_hand, dataset)
    torch.testing.assert_close(held.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)


def test_without_flow_the_samples_of_an_unchanged_module_need_an_index():
    with pytest.raises(KeyError, match=r"has no 'index'.*IndexedDataset"):
        unchanged.fit(Classifier(), unchanged.data(), EarlyLearningCallback())


class Ranks(fl.WeightedLossModule):
    """Rank r of two takes batches r, r + 2, ...; one process takes both at once, in another order in each epoch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)

    def sample_losses(self, batch):
        return F.cross_entropy(self.linear(batch["x"]), batch["index"] % 3, reduction="none")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self):
        x = torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(1))
        order = torch.arange(sum(SIZES)).roll(5 * self.trainer.current_epoch)  # to another process in each epoch
        batches = [part.tolist() for part in order.split(SIZES)]
        world = self.trainer.world_size
        rows = [{"x": row, "index": i} for i, row in enumerate(x)]
        mine = batches[self.trainer.global_rank :: 2] if world > 1 else [a + b for a, b in zip(*[iter(batches)] * 2)]
        return DataLoader(rows, batch_sampler=mine)

    def on_train_end(self):
        torch.save([*self.parameters()], f"{self.trainer.world_size}{self.trainer.global_rank}.pt")


def test_two_processes_have_the_targets_and_the_steps_of_one():
    settings = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False}
    examples.make_trainer(EarlyLearningCallback(), **settings).fit(Ranks())
    examples.make_trainer(EarlyLearningCallback(), devices=2, strategy="ddp_fork", **settings).fit(Ranks())
    one, *two = (torch.load(f"{name}.pt") for name in ("10", "20", "21"))
    for each in two:
        torch.testing.assert_close(each, one, rtol=1e-5, atol=1e-6)


def test_a_resumed_fit_ends_as_an_unbroken_one_and_needs_the_targets():
    def once(path, *others, **settings):
        keep = ModelCheckpoint("c", "{step}", save_top_k=-1, every_n_train_steps=3)  # in mid-epoch
        module, data = tiny_module(), PictureData(shuffle=False)
        settings = {"max_epochs": 3, "ckpt_path": path, "enable_checkpointing": True} | settings
        examples.fit(fl.ExactResumeCallback(), keep, *others, module=module, data=data, **settings)
        return module.state_dict()

    unbroken = once(None, EarlyLearningCallback())
    torch.testing.assert_close(once("c/step=6.ckpt", EarlyLearningCallback()), unbroken, rtol=0, atol=0)
    once(None, max_steps=3)
    with pytest.raises(RuntimeError, match="written without EarlyLearningCallback"):
        once("c/step=3-v1.ckpt", EarlyLearningCallback())


def test_a_step_without_the_logits_of_its_samples_is_refused(tmp_path):
    for module, data in ((None, None), (language_module(), language_data(tmp_path))):
        with pytest.raises(RuntimeError, match=r"has no cross_entropy of logits \[\d, C\]"):
            examples.fit(EarlyLearningCallback(), module=module, data=data)


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"momentum": 1.0}])
def test_a_wrong_argument_is_refused(settings):
    assert_refused(EarlyLearningCallback, settings)
