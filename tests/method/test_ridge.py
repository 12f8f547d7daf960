"""Ridge regression out of fold against scikit-learn's."""

import numpy as np
import torch
from sklearn.linear_model import Ridge

from flow_lightning.method import ridge
from flow_lightning.method.ridge import ridge_probabilities


def test_probabilities_are_those_of_scikit_learns_regressions_that_have_not_seen_the_sample(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    n, width, classes = 120, 7, 4
    targets = torch.arange(n) % 3  # the last class has no samples
    x = torch.randn(n, width, generator=generator) + torch.nn.functional.one_hot(targets, width)
    x -= x.mean(0)
    weights = torch.rand(n, generator=generator) + 0.1
    parts = torch.arange(n) // 3 % 4

    def blocks(rows):
        for some in rows.split(17):
            yield x[some], targets[some], weights[some]

    found = ridge_probabilities(blocks, parts, targets, weights, classes)
    outputs, one_hot = np.empty((n, classes)), np.eye(classes)[targets]
    for part in range(4):
        seen, own = (parts != part).numpy(), (parts == part).numpy()
        w, mean = weights.numpy()[seen], np.average(one_hot[seen], axis=0, weights=weights.numpy()[seen])
        penalty = 0.005 * (w[:, None] * x.numpy()[seen] ** 2).sum()
        model = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky")
        model.fit(x.numpy()[seen], one_hot[seen] - mean, sample_weight=w)
        outputs[own] = model.predict(x.numpy()[own]) + mean

    def softmax(scale):
        powers = np.exp(scale * (outputs - outputs.max(1, keepdims=True)))
        return powers / powers.sum(1, keepdims=True)

    losses = [-(weights.numpy() * np.log(softmax(s)[np.arange(n), targets])).sum() for s in ridge._SCALES.numpy()]
    expected = softmax(ridge._SCALES.numpy()[np.argmin(losses)])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert 0 < np.argmin(losses) < len(losses) - 1
