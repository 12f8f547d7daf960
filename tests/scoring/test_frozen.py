"""What fits of one model and data share: the same numbers to the last bit, labels of the fit, files that are true."""

from pathlib import Path

import pytest
import torch

import flow_lightning as fl
from flow_lightning.files import load_tensors, save_tensors
from flow_lightning.report.metrics import read_metrics
from flow_lightning.scoring.frozen import _FORMAT
from tests.callbacks.test_retention_budget import budget
from tests.examples import fit, slow
from tests.images import PictureData
from tests.retention import IMAGES, SIZE, image_module, labelled_images, unlabelled_images

FILES = ["retention", "target", "training"]


@pytest.fixture
def passes(monkeypatch):
    """Count the samples of each pass of a model."""
    import flow_lightning.scoring.score as score

    found, blocks = {}, score.score_blocks

    def noted(trainer, module, loader, batches, function, description, done=0):
        found[description] = found.get(description, 0) + sum(map(len, batches[done:]))
        return blocks(trainer, module, loader, batches, function, description, done)

    for name in ("frozen", "scoring", "score"):
        monkeypatch.setattr(f"flow_lightning.scoring.{name}.score_blocks", noted)
    return found


@pytest.fixture
def images(tmp_path):
    return labelled_images(tmp_path)


def run(images, shared="shared", labels=None, module=None, data=None, **settings):
    """Make a fit with a probe and a curve; return its numbers but the seconds, and the probe."""
    data = data or PictureData()
    if labels is not None:
        data.train_set.dataset.targets = labels
    probe = fl.LinearProbeCallback()
    measures = [fl.measures.TargetAccuracy(), fl.measures.PretrainedImages(images, image_size=SIZE)]
    retention = fl.RetentionCallback(measures=measures, frozen_folder=shared)
    callbacks = budget(data=images, curve=True, alphas=[1.0]), probe, fl.FlowWeightingCallback(), retention
    fit(*callbacks, module=module or image_module(), data=data, max_epochs=1, default_root_dir="run", **settings)
    metrics = read_metrics("run/metrics.json")
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}, probe.probe


def test_a_fit_that_shares_has_the_same_numbers_to_the_last_bit_without_the_passes(tmp_path, passes):
    images = unlabelled_images(tmp_path)
    alone, _ = run(images, None)
    assert passes["Linear probe"] == 30 and passes["Target before"] == 12 and not Path("shared").exists()
    assert passes["Pre-trained task"] == 2 * IMAGES  # before training, for both callbacks, and after it
    first, _ = run(images)
    passes.clear()
    second, _ = run(images)
    assert sorted(path.stem for path in Path("shared").iterdir()) == FILES
    assert passes["Linear probe"] == passes["Target before"] == 8  # the few that tell whether the file is true
    assert alone == first == second


def test_the_target_before_training_is_that_of_the_whole_model(images):
    module, data = image_module(), PictureData()
    metrics, probe = run(images, module=module, data=data)
    start, test = image_module().eval(), data.test_set.dataset
    with torch.no_grad():
        start.head.weight.copy_(probe.head.weight)
        start.head.bias.copy_(probe.head.bias)
        right = start(test.images).argmax(1) == torch.tensor(test.targets)
    assert metrics["target/before/top1"] == pytest.approx(right.double().mean().item(), abs=1e-12)


def test_labels_are_those_of_the_fit(images, passes):
    wrong = [(target + position % 2) % 3 for position, target in enumerate(PictureData().train_set.dataset.targets)]
    _, right_probe = run(images)
    alone, expected = run(images, None, wrong)
    passes.clear()
    shared, probe = run(images, "shared", wrong)
    assert passes["Linear probe"] == 8
    assert torch.equal(probe.targets, torch.tensor(wrong)) and torch.equal(probe.losses, expected.losses)
    assert shared == alone and not torch.equal(probe.losses, right_probe.losses)


def test_labels_that_the_samples_do_not_have_are_not_believed(images, passes):
    data = PictureData()
    data.train_set.targets = [0] * 30  # listed, but not those of the samples
    _, probe = run(images, data=data)
    assert probe.targets.unique().tolist() == [0, 1, 2]


def kept():
    """Return all values in the folder, in the order of the files."""
    files = [load_tensors(path, _FORMAT)[0] for path in sorted(Path("shared").iterdir())]
    return [values.tolist() for tensors in files for _, values in sorted(tensors.items())]


def changed_image(images):
    data = PictureData()
    data.train_set.dataset.images[7] *= 2
    return run(images, data=data)


def changed_weights(images):
    module = image_module()
    with torch.no_grad():
        next(module.model.parameters()).mul_(1.5)
    return run(images, module=module)


def changed_size(images):
    return run(images, data=PictureData(batch_size=10))


def damaged(images):
    for name in FILES:
        content = bytearray(Path(f"shared/{name}.safetensors").read_bytes())
        content[-1] ^= 255
        Path(f"shared/{name}.safetensors").write_bytes(content)
    return run(images)


def other_values(images):
    """Values of what the fingerprints do not tell apart."""
    for path in Path("shared").iterdir():
        tensors, metadata = load_tensors(path, _FORMAT)
        save_tensors(path, _FORMAT, {name: value + 1 for name, value in tensors.items()}, metadata)
    return run(images)


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (changed_image, ["training"], "the data set changed since"),
        slow(changed_weights, FILES, "the pre-trained model changed since"),
        slow(changed_size, ["target", "training"], "precision, device or batch size changed since"),
        slow(damaged, FILES, "its content has changed since it was written"),
        (other_values, FILES, "it is no longer true"),
    ],
)
def test_a_file_that_is_not_true_any_more_is_said_and_replaced(images, change, names, message):
    before, _ = run(images)
    old = kept()
    with pytest.warns(UserWarning, match="It is made anew") as found:
        after, _ = change(images)
    said = [str(each.message) for each in found if "It is made anew" in str(each.message)]
    assert len(said) == len(names)
    for name, line in zip(sorted(names), sorted(said), strict=True):
        assert line.startswith(f"shared/{name}.safetensors is not used: {message}")
    if change in (damaged, other_values):
        assert after == before
    if change is other_values:
        assert kept() == old


@pytest.mark.slow
def test_two_processes_share_with_one(images):
    alone, _ = run(images)
    written = {path: path.stat().st_mtime_ns for path in Path("shared").iterdir()}
    shared, _ = run(images, devices=2, strategy="ddp_fork")
    assert {path: path.stat().st_mtime_ns for path in Path("shared").iterdir()} == written  # nothing was made anew
    for name in ("retention/before/top1", "target/before/top1", "probe/mean_loss"):
        assert shared[name] == alone[name]
