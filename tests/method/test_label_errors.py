"""Which labels are wrong: on samples drawn from the model itself, and against the likelihood by another optimiser."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.metrics import average_precision_score

from flow_lightning.method.label_errors import right_labels, transition, wrong_share
from tests.examples import slow


def drawn(matrix, n=6000, sure=3.0, seed=0):
    """Probabilities, true classes drawn from them, and labels drawn by the transitions."""
    generator = torch.Generator().manual_seed(seed)
    classes = len(matrix)
    probabilities = (sure * torch.randn(n, classes, generator=generator)).softmax(1)
    true = probabilities.multinomial(1, generator=generator).squeeze(1)
    return probabilities, true, matrix[true].multinomial(1, generator=generator).squeeze(1)


def even(wrong, classes=10):
    return (1 - wrong) * torch.eye(classes) + wrong / (classes - 1) * (1 - torch.eye(classes))


def next_class(wrong, classes=10):
    return (1 - wrong) * torch.eye(classes) + wrong * torch.eye(classes).roll(1, 1)


@pytest.mark.parametrize("matrix", [even(0.0), even(0.3), next_class(0.3)], ids=["none", "even", "next class"])
def test_each_label_is_as_right_as_its_probability_says_and_the_transitions_are_found(matrix):
    probabilities, true, labels = drawn(matrix, 10_000)
    right, found = right_labels(probabilities, labels)
    assert right.dtype == torch.float32 and right.min() >= 0 and right.max() <= 1
    for low, high in [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)]:
        chosen = (right >= low) & (right < high)
        if chosen.sum() > 300:
            assert abs(float((true == labels)[chosen].float().mean()) - float(right[chosen].mean())) < 0.05
    np.testing.assert_allclose(found, matrix, atol=0.08)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-9)


@pytest.mark.parametrize("rate", [0.0, slow(0.2), 0.4])
def test_the_share_is_found_by_a_model_that_is_too_sure_of_hard_samples(rate):
    """Its probabilities are the squares of those from which true classes are drawn; the surest tenth is 2 % wrong."""
    probabilities, _, labels = drawn(even(rate), 20_000)
    too_sure = probabilities.square() / probabilities.square().sum(1, keepdim=True)
    _, matrix = right_labels(too_sure, labels)
    assert abs(wrong_share(too_sure, labels) - rate) < 0.04
    assert abs(1 - float(matrix.diagonal().mean()) - rate) < 0.04
    assert 1 - float(transition(too_sure, labels, even=torch.inf).diagonal().mean()) > rate + 0.08


def test_classes_that_are_confused_are_seen_only_where_there_are_any():
    """Held-out labels choose: even transitions stay one number, confused ones do not."""
    evenly, confused = (right_labels(p, y)[1] for p, _, y in (drawn(even(0.3), 2000), drawn(next_class(0.3), 2000)))
    off = ~torch.eye(10, dtype=torch.bool)
    assert evenly[off].std() < 1e-9 and confused[off].std() > 0.05


def test_more_wrong_labels_are_found_than_by_the_probability_of_the_label_where_classes_are_confused():
    probabilities, true, labels = drawn(next_class(0.3), 3000, sure=1.0)
    wrong, own = (true != labels).numpy(), probabilities.gather(1, labels[:, None]).squeeze(1)
    right, _ = right_labels(probabilities, labels)
    assert average_precision_score(wrong, 1 - right) > average_precision_score(wrong, -own) + 0.05


def test_the_transitions_have_the_highest_likelihood():
    """Of three classes, by a general optimiser of the likelihood itself."""
    matrix = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.0, 0.7]])
    probabilities, _, labels = drawn(matrix, 2000)

    def loss(values):
        rows = torch.from_numpy(values).view(3, 3).softmax(1).numpy()
        return -np.log((probabilities.numpy() @ rows)[np.arange(2000), labels]).mean()

    best = minimize(loss, 2 * np.eye(3).ravel(), method="L-BFGS-B")
    expected = torch.from_numpy(best.x).view(3, 3).softmax(1)
    np.testing.assert_allclose(transition(probabilities, labels, even=0.0, steps=300), expected, atol=5e-3)


def test_many_probabilities_are_sampled_and_every_label_gets_its_own(monkeypatch):
    probabilities, _, labels = drawn(even(0.3), 8000)
    whole, _ = right_labels(probabilities, labels)
    monkeypatch.setattr("flow_lightning.method.label_errors._MOST", 40_000)
    monkeypatch.setattr("flow_lightning.method.label_errors._ROWS", 700)
    part, _ = right_labels(probabilities, labels)
    assert len(part) == 8000
    torch.testing.assert_close(part, whole, atol=0.1, rtol=0)  # T of a half


def test_a_class_without_samples_changes_nothing():
    probabilities, _, labels = drawn(even(0.3, 3), 500)
    right, matrix = right_labels(torch.nn.functional.pad(probabilities, (0, 1)), labels)
    assert torch.isfinite(right).all() and matrix.shape == (4, 4)
