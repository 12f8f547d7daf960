"""The head before and after training: one pass, one probe, the same model for every method."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanlab import Datalab
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.method.probe import fit_probe
from tests.examples import fit, slow
from tests.images import PictureData, tiny_module


class CountForwards(Callback):
    """Count the images that go through the body, and keep the head as training finds it."""

    def setup(self, trainer, pl_module, stage):
        self.images = 0
        pl_module.model.conv1.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        self.images += len(inputs[0])

    def on_train_start(self, trainer, pl_module):
        self.scored, self.head = self.images, pl_module.head.weight.clone()


def run(*callbacks, module=None, **settings):
    """Fit pictures; return module and Trainer."""
    return fit(*callbacks, module=module or tiny_module(learning_rate=0.1), data=PictureData(), **settings)


def features_and_targets(module):
    """Return the features of all pictures, of unit scale, in float64, and the targets."""
    dataset = PictureData().train_set
    batch = next(iter(DataLoader(dataset, len(dataset))))
    with torch.no_grad():
        features = module.eval().features(batch).double().numpy()
    return (features - features.mean(0)) / features.var(0).mean() ** 0.5, batch["target"].numpy()


def test_the_head_is_scikit_learns_logistic_regression():
    """At the strength that validation chose, on the features of the frozen body."""
    probe, counter = fl.LinearProbeCallback(), CountForwards()
    x, targets = features_and_targets(tiny_module())
    run(probe, counter)
    reference = LogisticRegression(C=1 / (probe.probe.strength * 30), tol=1e-10, max_iter=100_000)
    expected = reference.fit(x, targets).predict_log_proba(x)
    losses = -torch.from_numpy(expected)[torch.arange(30), targets]
    torch.testing.assert_close(probe.probe.losses, losses.float(), rtol=1e-2, atol=5e-3)
    assert torch.equal(counter.head, probe.probe.head.weight)


def test_out_of_fold_losses_make_the_weights():
    in_sample, out_of_fold = fl.FlowWeightingCallback(), fl.FlowWeightingCallback()
    heads = []
    for folds, flow in ((0, in_sample), (5, out_of_fold)):
        counter = CountForwards()
        run(fl.LinearProbeCallback(folds=folds), flow, counter)
        assert counter.scored == 30  # one pass serves probe, temperature and weights
        heads.append(counter.head)
    assert out_of_fold.weights.temperature > in_sample.weights.temperature
    torch.testing.assert_close(*heads)


def test_features_above_the_budget_go_to_a_file(monkeypatch):
    files = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: files.append(args[0]) or from_file(*args, **kwargs))
    results = []
    for budget in (4.0, 1e-9):
        probe = fl.LinearProbeCallback(memory_budget=budget)
        run(probe)
        results.append(probe.probe)
    assert len(files) == 2
    assert not any(os.path.exists(file) for file in files)
    assert torch.equal(results[0].losses, results[1].losses)


def test_a_resumed_fit_keeps_the_head_of_its_checkpoint():
    checkpoint = ModelCheckpoint("ckpt", filename="mid", every_n_train_steps=2, save_top_k=1)
    run(fl.LinearProbeCallback(), checkpoint, enable_checkpointing=True, max_steps=2)
    saved = torch.load("ckpt/mid.ckpt", weights_only=True)["state_dict"]["model.fc.weight"]
    counter = CountForwards()
    run(fl.LinearProbeCallback(), counter, max_epochs=2, ckpt_path="ckpt/mid.ckpt")
    assert counter.scored == 0 and torch.equal(counter.head, saved)


def test_the_order_of_the_callbacks_does_not_matter():
    results = []
    for turn in (1, -1):
        flow, counter = fl.FlowWeightingCallback(), CountForwards()
        probe = fl.LinearProbeCallback(refit=False)
        run(*[probe, flow][::turn], counter)
        assert counter.scored == 30
        results.append((flow.weights.weights, flow.weights.fingerprint, counter.head))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][2], results[1][2])
    assert results[0][1] == results[1][1]


def test_a_module_that_cannot_be_probed_is_told_what_is_missing():
    with pytest.raises(TypeError, match=r"features\(batch\)"):
        fit(fl.LinearProbeCallback())


def test_too_few_classes_name_the_fix():
    module = fl.ImageClassificationModule("test_resnet.r160_in1k", 2, pretrained=False)
    with pytest.raises(ValueError, match=r"Set model\.num_classes"):
        run(fl.LinearProbeCallback(), module=module)


def test_a_full_disk_for_the_features_is_an_error_and_not_a_crash(monkeypatch):
    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"take .* GiB, and .* cannot take them .*No space left.*TMPDIR"):
        run(fl.LinearProbeCallback(memory_budget=0.0))


# -- after training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_the_refit_is_scikit_learns_solution_on_the_fine_tuned_body(weighted):
    flow = fl.FlowWeightingCallback()
    module, trainer = run(
        fl.LinearProbeCallback(refit=True), *[flow] * weighted, enable_checkpointing=True, max_steps=2
    )
    x, targets = features_and_targets(module)
    with torch.no_grad():
        probabilities = module(PictureData().train_set.dataset.images).softmax(1)
    weights = flow.weights.weights.numpy() if weighted else np.ones(30)
    strength = float(trainer.callback_metrics["refit/strength"])
    reference = LogisticRegression(C=1 / (strength * weights.sum()), tol=1e-10, max_iter=100_000)
    expected = reference.fit(x, targets, sample_weight=weights).predict_proba(x)
    torch.testing.assert_close(probabilities, torch.from_numpy(expected).float(), rtol=0, atol=5e-3)
    saved = torch.load("run/checkpoints/refitted.ckpt", weights_only=True)["state_dict"]["model.fc.weight"]
    assert torch.equal(saved, module.head.weight)


@pytest.mark.parametrize(
    ("refit", "weighted", "happens"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_a_refit_happens_under_flow_or_if_asked_for(refit, weighted, happens):
    _, trainer = run(fl.LinearProbeCallback(refit=refit), *[fl.FlowWeightingCallback()] * weighted, max_steps=2)
    assert ("refit/strength" in trainer.callback_metrics) == happens


def test_a_probe_alone_is_the_weighted_solution_on_the_frozen_body():
    """No step is made; the head is scikit-learn's with FLOW's weights of out-of-fold losses."""
    probe = fl.LinearProbeCallback(refit="weighted", folds=3, only=True)
    module, trainer = run(probe, max_epochs=2)
    assert trainer.global_step == 0
    losses = probe.probe.losses
    weights = torch.exp(-losses / losses.quantile(0.5))
    x, targets = features_and_targets(tiny_module())
    refit = probe.solve(module)
    reference = LogisticRegression(C=1 / (refit.strength * weights.sum().item()), tol=1e-10, max_iter=100_000)
    reference.fit(x, targets, sample_weight=weights.numpy())
    expected = -torch.from_numpy(reference.predict_log_proba(x))[torch.arange(30), targets]
    torch.testing.assert_close(refit.losses, expected.float(), rtol=1e-2, atol=5e-3)
    body = [{k: v for k, v in m.state_dict().items() if ".fc." not in k} for m in (module, tiny_module())]
    torch.testing.assert_close(*body, rtol=0, atol=0)


def test_a_corrected_refit_fits_the_probable_classes_in_place_of_the_labels():
    probe, data = fl.LinearProbeCallback(refit="corrected", folds=3), PictureData()
    targets = data.train_set.dataset.targets
    targets[::4] = [(target + 1) % 3 for target in targets[::4]]  # wrong ones
    module, trainer = fit(probe, module=tiny_module(learning_rate=0.1), data=data, max_steps=2)
    x, _ = features_and_targets(module)  # of the body as it is after training
    strength, count = float(trainer.callback_metrics["refit/strength"]), 3
    classes = fit_probe(torch.from_numpy(x).float(), torch.tensor(targets), count, folds=3).classes
    own = classes[torch.arange(30), targets]
    assert own.min() < 0.5 and (own - probe.probe.right).abs().max() > 1e-3, "not those of the frozen body"
    reference = LogisticRegression(C=1 / (strength * 30), tol=1e-10, max_iter=100_000)
    labels = np.tile(np.arange(count), 30)
    reference.fit(x.repeat(count, axis=0), labels, sample_weight=classes.flatten().numpy())
    with torch.no_grad():
        probabilities = module(PictureData().train_set.dataset.images).softmax(1)
    expected = torch.from_numpy(reference.predict_proba(x)).float()
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match="Set folds"):
        fl.LinearProbeCallback(refit="corrected")


@pytest.mark.parametrize("refit", [slow("weighted"), "corrected"])
def test_a_refit_behind_plain_training_survives_a_resume(refit):
    probe, resumed = (fl.LinearProbeCallback(refit=refit, folds=3) for _ in range(2))
    run(probe, ModelCheckpoint("ckpt", save_last=True), enable_checkpointing=True)
    _, trainer = run(resumed, max_epochs=2, ckpt_path="ckpt/last.ckpt")
    if refit == "weighted":
        losses = probe.probe.losses
        torch.testing.assert_close(resumed._refit_weights, torch.exp(-losses / losses.quantile(0.5)))
    assert trainer.callback_metrics["refit/strength"] > 0


def test_rules_of_the_probe_weigh_a_fit():
    probe, flow = fl.LinearProbeCallback(folds=3), fl.FlowWeightingCallback(weighting="excess")
    run(probe, flow)
    found = probe.probe
    expected = torch.exp(-(found.losses - found.entropies).clamp_min(0) / found.losses.quantile(0.5))
    torch.testing.assert_close(flow.weights.weights, expected)
    drop = fl.FlowWeightingCallback(weighting="drop")
    run(fl.LinearProbeCallback(folds=3), drop)
    torch.testing.assert_close(drop.weights.weights, 1 - found.issues.float())


def test_weights_by_the_posterior_start_from_the_first_rounds_head_and_come_again_from_a_file():
    def score():
        probe = fl.LinearProbeCallback(folds=3, rounds=2)
        flow = fl.FlowWeightingCallback(weighting="posterior", weights_file="kept.safetensors")
        run(probe, flow, max_epochs=0)
        return probe.probe, flow.weights

    probe, weights = score()
    first = fl.LinearProbeCallback(folds=3)
    run(first, max_epochs=0)
    assert torch.equal(probe.head.weight, first.probe.head.weight)
    assert torch.equal(weights.weights, probe.right) and torch.equal(weights.losses, probe.losses)
    again, of_file = score()
    assert torch.equal(of_file.weights, weights.weights) and of_file.temperature == weights.temperature
    assert torch.equal(again.head.weight, probe.head.weight)


@pytest.mark.parametrize("weighting", ["drop", "posterior"])
def test_a_probe_is_not_asked_about_labels_that_it_has_seen(weighting):
    with pytest.raises(ValueError, match=r"Set LinearProbeCallback\(folds=5\)"):
        run(fl.LinearProbeCallback(), fl.FlowWeightingCallback(weighting=weighting))


def test_cleanlab_takes_the_arrays_as_they_are_and_finds_the_same_scores():
    probe = fl.LinearProbeCallback(folds=3, arrays=True)
    module, _ = run(probe, max_epochs=0)
    features, probabilities = (np.load(f"run/{name}.npy") for name in ("features", "pred_probs"))
    _, targets = features_and_targets(module)
    loader = DataLoader(PictureData().train_set, 30)
    with torch.no_grad():
        np.testing.assert_allclose(features, module.features(next(iter(loader))), atol=1e-5)
    lab = Datalab({"label": targets}, label_name="label", verbosity=0)
    lab.find_issues(pred_probs=probabilities, features=features, issue_types={"label": {}, "near_duplicate": {}})
    scores = lab.get_issues("label")
    own = np.exp(-probe.probe.losses.numpy())
    np.testing.assert_allclose(probabilities[np.arange(30), targets], own, rtol=1e-5)
    assert spearmanr(scores["label_score"], own).statistic > 0.9  # cleanlab adjusts for classes
    assert len(lab.get_issues("near_duplicate")) == 30


def test_arrays_need_folds_and_features():
    def score():
        probe = fl.LinearProbeCallback(folds=3, arrays=True)
        run(probe, fl.FlowWeightingCallback(weights_file="w.safetensors"), max_epochs=0)

    with pytest.raises(ValueError, match="Set folds"):
        fl.LinearProbeCallback(arrays=True)
    score()
    Path("run/pred_probs.npy").unlink()
    with pytest.warns(UserWarning, match="Arrays were not written"):
        score()
