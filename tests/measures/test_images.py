"""Accuracy, agreement and divergence, each against another way to get there."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from scipy.special import rel_entr
from sklearn.metrics import top_k_accuracy_score

import flow_lightning as fl
from flow_lightning.measures import PretrainedImages, TargetAccuracy
from flow_lightning.measures.images import hardest, mean, target_outcomes, top_k_correct
from flow_lightning.report.metrics import METRICS, read_metrics, write_metrics
from tests import retention
from tests.images import Pictures
from tests.processes import launch
from tests.retention import TrainingOnly, image_fit, image_module, labelled_images, logits, unlabelled_images

CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}


def measure_images(path, **settings):
    measures = [TargetAccuracy(), PretrainedImages(path, image_size=retention.SIZE, batch_size=3)]
    module, _ = image_fit(fl.RetentionCallback(measures=measures), **settings)
    return module, read_metrics("run/metrics.json")


def original(module, batch_norm):
    """Rebuild the fine-tuned body with the pre-trained head (and BatchNorm layers) by parameter names alone."""
    model = retention.pretrained()
    kept = [name for name, layer in model.named_modules() if batch_norm and isinstance(layer, torch.nn.BatchNorm2d)]
    trained = module.model.state_dict().items()
    state = {name: value for name, value in trained if name.rpartition(".")[0] not in ["fc", *kept]}
    assert set(model.load_state_dict(state, strict=False).missing_keys) >= {"fc.weight", "fc.bias"}
    return model


def test_accuracy_is_measured_before_and_after_with_both_kinds_of_batch_norm(tmp_path):
    path = labelled_images(tmp_path)
    module, metrics = measure_images(path)
    labels = np.loadtxt(path, int, delimiter=",", skiprows=1, usecols=1)

    def accuracy(model, k):
        return top_k_accuracy_score(labels, logits(model, path), k=k, labels=range(retention.CLASSES))

    for key, model in {
        "retention/before/top{}": retention.pretrained(),
        "retention/after/top{}": original(module, batch_norm=False),
        "retention/after/top{}_original_bn": original(module, batch_norm=True),
    }.items():
        assert metrics[key.format(1)] == pytest.approx(accuracy(model, 1)), key
        assert metrics[key.format(5)] == pytest.approx(accuracy(model, 5)), key
    assert 0 < metrics["retention/before/top1"] < 1
    assert metrics["average"] == pytest.approx((metrics["target/top1"] + metrics["retention/after/top1"]) / 2)
    assert set(metrics) <= {metric.key for metric in METRICS}


def test_without_labels_agreement_and_kl_are_measured(tmp_path):
    path = unlabelled_images(tmp_path)
    module, metrics = measure_images(path)
    reference = logits(retention.pretrained(), path)
    for kind, batch_norm in (("", False), ("_original_bn", True)):
        now = logits(original(module, batch_norm), path)
        p, q = (torch.from_numpy(x).softmax(1).numpy() for x in (reference, now))
        assert metrics[f"retention/after/kl{kind}"] == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-3)
        agreed = (reference.argmax(1) == now.argmax(1)).mean()
        assert metrics[f"retention/after/agreement{kind}"] == pytest.approx(agreed)
        assert metrics[f"average{kind}"] == pytest.approx((metrics["target/top1"] + agreed) / 2)
    assert metrics["retention/after/kl"] > 0 and metrics["retention/before/agreement"] == 1
    assert metrics["retention/after/kl"] != metrics["retention/after/kl_original_bn"]
    assert set(metrics) <= {metric.key for metric in METRICS}


def test_target_and_its_hardest_samples():
    module = image_module()
    before = deepcopy(module).eval()
    image_fit(fl.RetentionCallback(measures=[TargetAccuracy(hard_fraction=0.3)]), module=module)
    metrics = read_metrics("run/metrics.json")
    test = Pictures(9, seed=2)
    targets = torch.tensor(test.targets)
    with torch.no_grad():
        first, last = before(test.images), module.eval()(test.images)
    losses = -first.log_softmax(1).gather(1, targets[:, None]).flatten().numpy()
    hard = np.argsort(losses)[-3:]
    right = (last.argmax(1) == targets).numpy()
    assert metrics["target/before/top1"] == pytest.approx((first.argmax(1) == targets).double().mean().item())
    assert metrics["target/top1"] == pytest.approx(right.mean())
    assert metrics["target/hard_top1"] == pytest.approx(right[hard].mean())
    assert not any(key.startswith("retention/") for key in metrics)


def test_without_test_set_only_the_pretrained_task_is_measured(tmp_path):
    with pytest.warns(UserWarning, match=r"no test_dataloader\(\)"):
        _, metrics = measure_images(labelled_images(tmp_path), data=TrainingOnly())
    assert "retention/after/top1" in metrics and "target/top1" not in metrics and "average" not in metrics


def test_without_batch_norm_both_kinds_are_equal(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=retention.CLASSES, img_size=retention.SIZE)
    module = fl.ImageClassificationModule(model, num_classes=3, learning_rate=0.05)
    _, metrics = measure_images(unlabelled_images(tmp_path), module=module)
    for name in ("agreement", "kl"):
        assert metrics[f"retention/after/{name}_original_bn"] == metrics[f"retention/after/{name}"]


def measure_still(path, **settings):
    """Measure a model that does not learn, for comparison."""
    module = image_module(learning_rate=0.0, batch_norm="frozen")
    _, metrics = measure_images(path, module=module, max_epochs=1, **settings)
    return {key: value for key, value in metrics.items() if "time/" not in key}


def measure_in_shards(path):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    write_metrics("shards.json", measure_still(path, devices=2, strategy=strategy))


def test_two_processes_measure_what_one_does(tmp_path):
    labelled, unlabelled = labelled_images(tmp_path), str(tmp_path / "images")
    for path in (labelled, unlabelled):
        one, two = measure_still(path), measure_still(path, devices=2, strategy="ddp_fork")
        assert two == pytest.approx(one, abs=1e-6)
        assert {"target/hard_top1", "retention/samples", "average"} < set(one)


@pytest.mark.slow
def test_a_model_in_shards_measures_what_a_whole_one_does(tmp_path):
    path = unlabelled_images(tmp_path)
    launch(measure_in_shards, path)
    assert read_metrics("shards.json") == pytest.approx(measure_still(path), abs=1e-6)


def test_more_processes_than_images(tmp_path):
    path = unlabelled_images(tmp_path)
    for number in range(1, retention.IMAGES):
        (tmp_path / "images" / f"{number}.png").unlink()
    assert measure_still(path, devices=2, strategy="ddp_fork")["retention/samples"] == 1


class Module(LightningModule):
    data_config = CONFIG | {"input_size": (3, 20, 20)}
    pretrained_head = torch.nn.Linear(2, 5)

    def pretrained_task(self, original_batch_norm):
        raise AssertionError("not needed to open the images")


def red_image(module, data=None, **settings):
    """Return the tensor of a red picture."""
    Image.new("RGB", (30, 30), (255, 0, 0)).save("red.png")
    measure = PretrainedImages(".", **settings)
    measure.prepare(SimpleNamespace(datamodule=data, lightning_module=module), module)
    return measure.loader.dataset[0]["image"]


def test_images_are_prepared_as_the_data_module_says_else_as_the_model_expects():
    data = SimpleNamespace(image_size=16, mean=[0.0] * 3, std=[1.0] * 3, interpolation=None)
    for source, size, colour in ((None, 20, [1.0, -1.0, -1.0]), (data, 16, [1.0, 0.0, 0.0])):
        expected = torch.tensor(colour)[:, None, None].expand(3, size, size)
        torch.testing.assert_close(red_image(Module(), source), expected)
    assert red_image(Module(), data, image_size=8).shape[-1] == 8


def test_a_module_without_pretrained_task_is_refused():
    with pytest.raises(TypeError, match=r"LightningModule has no pretrained_task\(\)"):
        red_image(LightningModule())
    body = Module()
    body.pretrained_head = None
    with pytest.raises(ValueError, match="Module has no pre-trained head"):
        red_image(body)


def test_batches_that_are_no_dicts_are_named():
    with pytest.raises(TypeError, match="got a list; expected batches that are dicts"):
        target_outcomes(Module(), [torch.zeros(2, 1), torch.zeros(2)])
    with pytest.raises(TypeError, match=r"got a dict of \['x'\]"):
        target_outcomes(Module(), {"x": torch.zeros(2)})


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_accuracy_is_that_of_sklearn(k):
    logits, targets = torch.randn(101, 7), torch.randint(7, (101,))
    expected = top_k_accuracy_score(targets.numpy(), logits.numpy(), k=k, labels=range(7))
    assert mean(top_k_correct(logits, targets, k)) == pytest.approx(expected)


def test_more_guesses_than_classes_are_always_right_but_a_diverged_network_knows_nothing():
    targets, nothing = torch.tensor([0, 1, 2, 0]), torch.full((4, 3), torch.nan)
    assert top_k_correct(torch.randn(4, 3), targets, k=5).all()
    assert not top_k_correct(nothing, targets).any() and not top_k_correct(nothing, targets, k=5).any()


@pytest.mark.parametrize(("n", "fraction", "count"), [(1, 0.1, 1), (11, 0.1, 2), (30, 0.1, 3), (10, 1.0, 10)])
def test_hardest_are_the_highest_losses(n, fraction, count):
    losses = torch.rand(n)
    expected = sorted(np.argsort(losses.numpy())[-count:].tolist())
    assert hardest(losses, fraction).tolist() == expected
