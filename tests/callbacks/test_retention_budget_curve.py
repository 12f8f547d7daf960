"""All points of a path for a board: heads solved at each, and what is read and computed only once."""

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

import flow_lightning as fl
import flow_lightning.scoring.score as scoring
from flow_lightning.measures import GeneralText
from flow_lightning.measures.outcomes import halves
from flow_lightning.method.probe import fit_probe
from flow_lightning.method.weights import SampleWeights
from flow_lightning.report.metrics import read_metrics
from tests import retention
from tests.callbacks.test_retention_budget import ALPHAS, Train, budget, copy_of, line, run
from tests.images import Pictures
from tests.retention import image_module, unlabelled_images


@pytest.fixture
def passes(monkeypatch):
    """Note what each pass of a model over samples is for."""
    found, score = [], scoring.score_blocks

    def noted(*args):
        found.append(args[5])
        return score(*args)

    monkeypatch.setattr("flow_lightning.scoring.scoring.score_blocks", noted)
    return found


def test_the_head_of_the_pretrained_body_is_solved_on_the_features_from_before_training(tmp_path, passes):
    callback, probe = budget(data=unlabelled_images(tmp_path), curve=True), fl.LinearProbeCallback()
    run(callback, probe, fl.FlowWeightingCallback())
    data, start = Pictures(12, seed=1), image_module().eval()
    with torch.no_grad():
        features = start.features({"image": data.images})
    weights = SampleWeights.from_losses(probe.probe.losses).weights
    expected = fit_probe(features, torch.tensor(data.targets), 3, weights=weights)
    torch.testing.assert_close(callback._heads[0.0].losses, expected.losses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(callback._heads[0.0].head.weight, expected.head.weight, rtol=1e-2, atol=1e-4)
    assert not torch.allclose(callback._heads[1.0].losses, expected.losses, rtol=1e-2)
    assert Counter(passes) == {"Linear probe": 1, "Head refit": len(ALPHAS) - 1}


def test_hard_images_are_those_of_the_head_from_before_training_at_each_point(tmp_path):
    class Tested(retention.Target):
        def test_dataloader(self):
            return torch.utils.data.DataLoader(pictures, batch_size=16)

    pictures, module = Pictures(60, seed=2), image_module(learning_rate=0.0, batch_norm="frozen")
    pictures.targets = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0)).tolist()  # all are hard
    callback, start = budget(data=unlabelled_images(tmp_path), curve=True), copy_of(module)
    others = fl.LinearProbeCallback(), fl.FlowWeightingCallback()
    module, end = run(callback, *others, module=module, data=Tested(), size=8.0)
    targets, points = torch.tensor(pictures.targets), read_metrics("run/metrics.json")["path/points"]

    def logits(alpha, head):
        module.load_state_dict(line(start, end, alpha) | head)
        with torch.no_grad():
            return module.eval()(pictures.images)

    losses = cross_entropy(logits(0.0, callback._head), targets, reduction="none")
    hard = losses.argsort(descending=True)[:6]
    for each in points:
        solved = callback._heads[each["alpha"]].head
        head = {"model.fc.weight": solved.weight, "model.fc.bias": solved.bias}
        right = logits(each["alpha"], head).argmax(1) == targets
        assert each["test_top1"] == pytest.approx(right.float().mean().item())
        assert each["test_hard_top1"] == pytest.approx(right[hard].float().mean().item())
    assert len({each["test_hard_top1"] for each in points}) > 1


def test_more_points_read_no_more_samples(tmp_path, monkeypatch):
    images, reads, read = unlabelled_images(tmp_path), [], Pictures.__getitem__
    monkeypatch.setattr(Pictures, "__getitem__", lambda self, index: reads.append(index) or read(self, index))
    counts = []
    for alphas in ([1.0], [0.2, 0.4, 0.6, 0.8, 1.0]):
        reads.clear()
        run(budget(data=images, alphas=alphas, curve=True), fl.LinearProbeCallback(), fl.FlowWeightingCallback())
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


def points(folder, **settings):
    callbacks = budget(data=folder, curve=True), fl.LinearProbeCallback(), fl.FlowWeightingCallback()
    keep = ModelCheckpoint("c", "{epoch}", save_top_k=-1)
    settings = {"max_epochs": 2, "size": 0.5, "enable_checkpointing": True} | settings
    run(*callbacks, keep, module=image_module(learning_rate=0.0, batch_norm="frozen"), **settings)
    return read_metrics("run/metrics.json")["path/points"]


@pytest.mark.slow
def test_a_resumed_fit_finds_the_same_curve(tmp_path):
    """It has no features from before training, so it computes them anew."""
    images = unlabelled_images(tmp_path)
    whole = points(images)
    resumed = points(images, ckpt_path="c/epoch=0.ckpt")
    assert len({each["target_loss"] for each in whole}) == len(ALPHAS)
    for point, other in zip(whole, resumed, strict=True):
        assert other == pytest.approx(point, rel=1e-3)


@pytest.mark.slow
def test_two_processes_find_the_curve_of_one(tmp_path):
    images = unlabelled_images(tmp_path)
    alone = points(images)
    for point, other in zip(alone, points(images, devices=2, strategy="ddp_fork"), strict=True):
        assert other == pytest.approx(point, rel=1e-3)


def test_a_curve_measures_the_other_half_once_for_each_point(tmp_path):
    images = unlabelled_images(tmp_path)
    plain, curve = budget(data=images), budget(data=images, curve=True)
    run(plain)
    alone = read_metrics("run/metrics.json")
    run(curve)
    metrics = read_metrics("run/metrics.json")
    assert curve.alpha == plain.alpha > 0
    assert metrics["budget/kept_other_half"] == alone["budget/kept_other_half"]
    other = len(halves([f"{number}.png" for number in range(retention.IMAGES)], 99)[1])
    passes = len(ALPHAS) - 1  # the pre-trained model needs none
    assert metrics["budget/forwards"] - alone["budget/forwards"] == (passes - 1) * other > 0


def test_a_curve_solves_the_head_of_the_chosen_point_once(tmp_path, monkeypatch):
    images, states, solved = unlabelled_images(tmp_path), [], []
    solve = fl.LinearProbeCallback.solve
    monkeypatch.setattr(fl.LinearProbeCallback, "solve", lambda *args: solved.append(1) or solve(*args))
    for curve in (False, True):
        callback = budget(data=images, alphas=[0.5], curve=curve)
        module, _ = run(callback, fl.LinearProbeCallback(), fl.FlowWeightingCallback())
        assert callback.alpha == 0.5 and "refit/strength" in read_metrics("run/metrics.json")
        states.append(copy_of(module))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert len(solved) == 1 + 2  # once at the end, then once for each point


def losses_of(module, dataset):
    """Return the mean loss of all tokens of responses, one sample after the other, without padding."""
    losses = []
    for sample in dataset:
        with torch.no_grad():
            logits = module.eval()(sample["input_ids"][None])[0, :-1]
        first = sample["prompt_length"] - 1
        losses.append(cross_entropy(logits[first:], sample["input_ids"][first + 1 :], reduction="none"))
    return float(torch.cat(losses).mean())


def test_a_curve_of_a_language_model_has_the_losses_of_test_and_validation_at_each_point(monkeypatch):
    monkeypatch.setattr("flow_lightning.method.budget._FEWEST_TEXTS", 1)
    module, train = retention.language_module(learning_rate=0.0), Train(0.5)
    start, text = copy_of(module), GeneralText([retention.text_file()], window=20)
    callback = budget(of="perplexity", data=text, keep=0.01, alphas=[0.5, 1.0], curve=True)
    data = retention.language_data(validation_fraction=0.3)
    settings = {"module": module, "data": data, "max_epochs": 1, "limit_val_batches": 1.0}
    module, _ = retention.language_fit(callback, train, fl.FlowWeightingCallback(), **settings)
    points = read_metrics("run/metrics.json")["path/points"]
    assert [each["alpha"] for each in points] == [0.0, 0.5, 1.0] and len(data.val_set) > 2
    for each in points:
        module.load_state_dict(line(start, train.state, each["alpha"]))
        assert each["test_loss"] == pytest.approx(losses_of(module, data.test_dataloader().dataset), rel=1e-5)
        assert each["validation_loss"] == pytest.approx(losses_of(module, data.val_set), rel=1e-5)
    assert len({each["test_loss"] for each in points}) == 3


def test_a_curve_without_a_test_set_is_refused_before_training_and_one_without_validation_warns(tmp_path):
    images = unlabelled_images(tmp_path)
    with pytest.raises(ValueError, match="curve=True measures the test set"):
        run(budget(data=images, curve=True), data=retention.TrainingOnly())
    with pytest.warns(UserWarning, match="a board cannot choose among points"):
        run(budget(data=images, curve=True))
