"""The probe against scikit-learn's logistic regression, which solves the same problem with its own code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from flow_lightning.method import probe as probing
from flow_lightning.method.label_errors import right_labels, stratified_parts
from flow_lightning.method.probe import fit_probe
from flow_lightning.method.ridge import ridge_probabilities


def clusters(n=150, d=12, classes=3, spread=1.5, seed=0):
    """Classes that overlap, with features of very different scales and far from 0."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=n)
    centres = rng.normal(size=(classes, d))
    features = (centres[targets] + spread * rng.normal(size=(n, d))) * np.geomspace(0.1, 10, d) + 3
    return torch.from_numpy(features).float(), torch.from_numpy(targets)


def sklearn_probabilities(features, targets, strength, evaluate=None, train=None, weights=None):
    """Minimise the same objective: mean cross-entropy + strength / 2 |W|^2, W for features of unit scale."""
    x, y = features.double().numpy(), targets.numpy()
    train = np.ones(len(y), dtype=bool) if train is None else train.numpy()
    weights = np.ones(len(y)) if weights is None else weights.numpy()
    mean, scale = x.mean(0), np.sqrt(x.var(0).mean())
    model = LogisticRegression(C=1 / (strength * weights[train].sum()), tol=1e-10, max_iter=100_000)
    model.fit((x[train] - mean) / scale, y[train], sample_weight=weights[train])
    return model.predict_proba(((features if evaluate is None else evaluate).double().numpy() - mean) / scale)


def losses_of(probabilities, targets):
    return -np.log(probabilities[np.arange(len(targets)), targets.numpy()])


@pytest.mark.parametrize("strength", [1.0, 0.03, 0.001])
def test_head_and_losses_are_scikit_learns(strength):
    features, targets = clusters()
    probe = fit_probe(features, targets, 3, strengths=[strength])
    expected = sklearn_probabilities(features, targets, strength)
    np.testing.assert_allclose(probe.head(features).softmax(1).numpy(), expected, atol=2e-3)
    np.testing.assert_allclose(probe.losses.numpy(), losses_of(expected, targets), atol=5e-3)


def test_the_strength_is_the_strongest_within_one_standard_error_of_the_best():
    features, targets = clusters()
    strengths = [10.0, 1.0, 0.1, 0.01, 0.001]
    probe = fit_probe(features, targets, 3, strengths=strengths)
    held, found = stratified_parts(targets, 5) == 0, {}
    for strength in strengths:
        p = sklearn_probabilities(features, targets, strength, features[held], train=~held)
        losses = losses_of(p, targets[held])
        found[strength] = (losses.mean(), losses.std() / np.sqrt(len(losses)))
    for strength, (loss, error) in probe.validation.items():
        assert (loss, error) == pytest.approx(found[strength], abs=5e-3)
    best = min(found, key=lambda strength: found[strength][0])
    assert probe.strength == max(s for s in strengths if found[s][0] <= sum(found[best]))


def test_a_path_of_penalties_ends_once_the_held_out_loss_has_risen_twice():
    features, targets = clusters(spread=3.0)
    probe = fit_probe(features, targets, 3)
    losses = [loss for loss, _ in probe.validation.values()]
    assert len(losses) < len(probing.STRENGTHS)
    assert losses[-1] > min(losses) and losses[-2] > min(losses) and losses[-3] == min(losses)


def test_out_of_fold_losses_come_from_probes_that_have_not_seen_the_sample():
    features, targets = clusters(60)
    probe = fit_probe(features, targets, 3, folds=4, strengths=[0.01])
    parts = stratified_parts(targets, 4)
    for unseen in (parts == fold for fold in range(4)):
        p = sklearn_probabilities(features, targets, 0.01, features[unseen], train=~unseen)
        np.testing.assert_allclose(probe.losses[unseen], losses_of(p, targets[unseen]), atol=2e-2)
    in_sample = fit_probe(features, targets, 3, strengths=[0.01])
    assert probe.losses.mean() > in_sample.losses.mean()
    torch.testing.assert_close(probe.head.weight, in_sample.head.weight)


def test_blocks_give_the_same_solution(monkeypatch):
    """Features that do not fit the device at once go through in blocks; memory-mapped ones, too."""
    features, targets = clusters()
    whole = fit_probe(features, targets, 3, strengths=[0.1])
    monkeypatch.setattr(probing, "_ROWS", 32)
    blocks = fit_probe(features, targets, 3, strengths=[0.1])
    torch.testing.assert_close(blocks.losses, whole.losses, rtol=1e-3, atol=1e-3)


def test_parts_are_equal_in_size_and_classes():
    targets = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)
    parts = stratified_parts(targets, 5)
    assert parts.bincount().tolist() == [14] * 5
    for part in range(5):
        assert targets[parts == part].bincount().tolist() == [8, 4, 2]


def test_constant_features_do_no_harm():
    probe = fit_probe(torch.ones(10, 4), torch.arange(10) % 2, 2, strengths=[0.1])
    np.testing.assert_allclose(probe.losses.numpy(), np.log(2), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda f, t: (f[:0], t[:0]), {}, "training set is empty"),
        (lambda f, t: (f.index_fill(0, torch.tensor([4]), float("nan")), t), {}, r"samples \[4\] are NaN"),
        (lambda f, t: (f, t + 1), {}, "expected targets from 0 to 2"),
        (lambda f, t: (f, t), {"folds": 1}, "expected 0 .in sample. or 2 to 150"),
        (lambda f, t: (f, t), {"corrected": True}, "Set folds, to 5 for instance"),
    ],
)
def test_bad_input_is_an_error(change, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(*change(*clusters()), 3, **arguments)


def test_weights_of_samples_are_scikit_learns():
    features, targets = clusters()
    weights = torch.rand(150, generator=torch.Generator().manual_seed(0))
    probe = fit_probe(features, targets, 3, strengths=[0.03], weights=weights)
    expected = sklearn_probabilities(features, targets, 0.03, weights=weights)
    np.testing.assert_allclose(probe.head(features).softmax(1).numpy(), expected, atol=2e-3)


def test_a_corrected_head_is_solved_on_the_true_classes_of_which_each_counts_as_a_sample():
    """One of each class, weighted by its probability, which scikit-learn can solve."""
    features, targets = clusters(spread=2.5)
    plain, probe = (fit_probe(features, targets, 3, folds=3, strengths=[0.03], corrected=c) for c in (False, True))
    each, labels = features.repeat_interleave(3, dim=0), torch.arange(3).repeat(len(targets))
    expected = sklearn_probabilities(each, labels, 0.03, features, weights=probe.classes.flatten())
    np.testing.assert_allclose(probe.head(features).softmax(1).numpy(), expected, atol=2e-3)
    for name in ("classes", "losses", "right"):  # of rough solutions
        torch.testing.assert_close(getattr(probe, name), getattr(plain, name), rtol=0, atol=0.02)
    assert not torch.equal(probe.head.weight, plain.head.weight)


@pytest.mark.parametrize("folds", [0, 3])
def test_entropies_and_label_issues_are_those_of_the_same_probabilities(folds):
    """Confident learning by hand, sample by sample, on the probabilities of scikit-learn."""
    features, targets = clusters(spread=2.5)
    probe = fit_probe(features, targets, 3, folds=folds, strengths=[0.03])
    p = sklearn_probabilities(features, targets, 0.03)
    for fold in range(folds):
        unseen = stratified_parts(targets, folds) == fold
        p[unseen] = sklearn_probabilities(features, targets, 0.03, features[unseen], ~unseen)
    np.testing.assert_allclose(probe.entropies, -(p * np.log(p)).sum(1), atol=5e-3)
    own = p[np.arange(len(p)), targets]
    sure = [own[targets == c].mean() for c in range(3)]
    expected = []
    for each, target in zip(p, targets.tolist()):
        confident = {c: each[c] for c in range(3) if each[c] >= sure[c]}
        is_other = bool(confident) and max(confident, key=confident.get) != target
        expected.append(is_other and each.argmax() != target)
    near = (np.abs(p - np.array(sure)) < 1e-3).any(1)  # of the threshold: rounding decides
    assert near.sum() < 5 and 0 < sum(expected) < len(p) / 2
    assert (probe.issues.numpy() == expected)[~near].all()
    again = type(probe).from_tensors(probe.tensors())
    assert torch.equal(again.issues, probe.issues) and torch.equal(again.entropies, probe.entropies)


def test_a_second_round_weighs_the_samples_by_the_losses_of_the_first():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=generator) + 2 * F.one_hot(targets, 5)
    given = torch.where(torch.rand(300, generator=generator) < 0.3, (targets + 1) % 3, targets)
    first = fit_probe(features, given, 3, folds=5)
    weights = torch.from_numpy(np.exp(-first.losses.double().numpy() / np.median(first.losses))).float()
    by_hand = fit_probe(features, given, 3, folds=5, weights=weights)
    second = fit_probe(features, given, 3, folds=5, rounds=2)
    torch.testing.assert_close(second.losses, by_hand.losses, rtol=1e-3, atol=1e-4)
    assert torch.equal(second.head.weight, first.head.weight) and torch.equal(second.head.bias, first.head.bias)
    wrong = given != targets
    assert roc_auc_score(wrong, second.losses) > roc_auc_score(wrong, first.losses)


def test_labels_are_judged_by_the_mean_of_probe_and_ridge_regression():
    features, targets = clusters(spread=0.8)
    targets[::5] = (targets[::5] + 1) % 3
    weights = torch.rand(len(targets), generator=torch.Generator().manual_seed(0)) + 0.5
    probe = fit_probe(features, targets, 3, folds=4, strengths=[0.03], weights=weights)
    parts = stratified_parts(targets, 4)
    x = features - features.mean(0)
    x = x / x.square().mean().sqrt()
    other = ridge_probabilities(lambda rows: [(x[rows], targets[rows], weights[rows])], parts, targets, weights, 3)
    mean = (probe.probabilities + other) / 2
    torch.testing.assert_close(probe.right, right_labels(mean, targets)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.probabilities.gather(1, targets[:, None]).squeeze(1), (-probe.losses).exp())
    assert probe.right.min() < 0.95 and "right" not in fit_probe(features, targets, 3, strengths=[0.03]).tensors()
