"""ImageClassificationModule over the timm families, with random weights: no network is needed."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from lightning import Callback
from torch import nn

import flow_lightning as fl
from flow_lightning.scoring.evaluation import batch_norms
from tests.examples import make_trainer
from tests.images import PictureData, tiny_module

SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
FAMILIES = {
    "ResNet": ("test_resnet.r160_in1k", {}),
    "EfficientNet": ("test_efficientnet.r160_in1k", {}),
    "ConvNeXt": ("test_convnext.r160_in1k", {}),
    "ViT": ("test_vit.r160_in1k", {"img_size": 32}),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
}
family = pytest.mark.parametrize(("name", "kwargs"), FAMILIES.values(), ids=FAMILIES)


@family
@pytest.mark.parametrize("ready", [False, True])
def test_the_head_sees_the_features_and_the_pretrained_task_is_the_pretrained_model(name, kwargs, ready):
    torch.manual_seed(0)
    original, images = timm.create_model(name, **kwargs).eval(), torch.randn(2, 3, 32, 32)
    expected = original(images)
    module = fl.ImageClassificationModule(original, 3) if ready else tiny_module(name, model_kwargs=kwargs)
    before, head = module.eval()(images), module.head
    torch.testing.assert_close(head(module.features({"image": images})), before)
    assert before.shape == (2, 3)
    with module.pretrained_task():
        torch.testing.assert_close(module(images), expected)
    assert torch.equal(module(images), before) and module.head is head


@family
def test_fit_with_probe_and_flow(name, kwargs):
    """One pass serves probe and weights; the weights are those of the probed model's own losses."""
    module = tiny_module(name, model_kwargs=kwargs)
    flow, data, probed = fl.FlowWeightingCallback(), PictureData(), {}

    class Score(Callback):
        """After the probe: score the probed model itself, a second time."""

        def on_fit_start(self, trainer, pl_module):
            batch = next(iter(torch.utils.data.DataLoader(data.train_set, 30)))
            with torch.no_grad():
                probed["losses"] = pl_module.eval().sample_losses(batch)
            pl_module.train()

    make_trainer(fl.LinearProbeCallback(), flow, Score()).fit(module, datamodule=data)
    torch.testing.assert_close(flow.weights.losses, probed["losses"], rtol=1e-4, atol=1e-5)
    w = np.exp(-flow.weights.losses.numpy() / np.median(flow.weights.losses.numpy()))
    np.testing.assert_allclose(flow.weights.weights.numpy(), w, rtol=1e-4)


def test_original_batch_norm_is_put_back_and_the_trained_one_after_it():
    module = tiny_module(batch_norm="train")
    pristine = deepcopy(module.model.state_dict())
    make_trainer(max_epochs=2).fit(module, datamodule=PictureData())
    trained = deepcopy(module.model.state_dict())
    layers = [name for name, layer in module.model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    norms = [key for key in pristine if key.rpartition(".")[0] in layers]
    assert any(not torch.equal(pristine[k], trained[k]) for k in norms if "running" in k)
    with module.pretrained_task(original_batch_norm=True):
        inside = module.model.state_dict()
        for key in norms:
            assert torch.equal(inside[key], pristine[key]), key
        kept = "layer1.0.conv1.weight"
        assert torch.equal(inside[kept], trained[kept]) and not torch.equal(inside[kept], pristine[kept])
        assert torch.equal(inside["fc.weight"], module.pretrained_head.weight)
    assert all(torch.equal(value, trained[key]) for key, value in module.model.state_dict().items())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_kind_of_batch_norm_is_found_at_any_depth(layer):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer(2), nn.LayerNorm(2)))
    assert list(batch_norms(model)) == [model[1][0]]
    assert {*batch_norms(model).state_dict()} >= {"0.weight", "0.running_mean", "0.running_var"}


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_batch_norm_statistics_stay_or_move_as_asked(batch_norm):
    module = tiny_module(batch_norm=batch_norm)
    before = deepcopy(module.state_dict())
    make_trainer().fit(module, datamodule=PictureData())
    stayed = {key for key, value in module.state_dict().items() if torch.equal(value, before[key])}
    assert ({key for key in before if "running" in key} <= stayed) == (batch_norm == "frozen")
    assert {key for key in before if "bn1.weight" in key} - stayed
    assert module.train().model.bn1.training == (batch_norm == "train")


def test_channels_last_changes_the_layout_and_not_the_result():
    images = torch.randn(2, 3, 32, 32)
    last, first = tiny_module(channels_last=True).eval(), tiny_module(channels_last=False).eval()
    assert last.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images), first(images), rtol=1e-4, atol=1e-5)


def test_losses_and_test_metrics_are_torchs():
    module, data = tiny_module(), PictureData()
    (metrics,) = make_trainer().test(module, datamodule=data, verbose=False)
    batch = next(iter(torch.utils.data.DataLoader(data.test_set, 12)))
    with torch.no_grad():
        logits, targets = module.eval()(batch["image"]), batch["target"]
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(module.sample_losses(batch).detach(), losses)
    assert metrics["test/top1"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert metrics["test/top5"] == 1.0
    assert metrics["test/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["batch", "weights", "sampling"])
def test_training_smooths_labels_and_scoring_does_not(reduction):
    module, plain = (tiny_module(label_smoothing=share, reduction=reduction).eval() for share in (0.3, 0.0))
    batch = next(iter(PictureData(n=12).scoring_dataloader()))
    torch.testing.assert_close(module.sample_losses(batch), plain.sample_losses(batch), rtol=0, atol=0)
    weights = torch.linspace(0, 1, 12).round() if reduction == "sampling" else torch.linspace(0.1, 1, 12)
    vars(module).update(sample_weights=fl.SampleWeights(torch.ones(12), 1.0, weights), log=lambda *_, **__: None)
    logits, own = module(batch["image"]), weights[batch["index"]]
    soft = 0.7 * nn.functional.one_hot(batch["target"], 3) + 0.1
    expected = (own * -(soft * logits.log_softmax(1)).sum(1)).sum() / (own.sum() if reduction == "weights" else 8)
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_a_loss_of_ones_own_is_trained_on_and_a_wrong_share_is_refused():
    class Own(fl.ImageClassificationModule):
        def sample_losses(self, batch):
            return super().sample_losses(batch).square()

    module = Own("test_resnet.r160_in1k", 3, pretrained=False).eval()
    batch = next(iter(PictureData().scoring_dataloader()))
    torch.testing.assert_close(module.training_losses(batch), module.sample_losses(batch))
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        tiny_module(label_smoothing=1.0)


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(ValueError, match="resnet18"):
        fl.ImageClassificationModule("resnet81", 3)
