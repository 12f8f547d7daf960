import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flow_lightning.method.flow import flow_weights, mixture_temperature, temperature
from flow_lightning.method.weights import SampleWeights

LOSSES = st.lists(st.floats(2**-10, 1e4, width=32), min_size=1, max_size=50)


@given(LOSSES, st.floats(0, 1))
def test_temperature_is_numpys_quantile(losses, quantile):
    expected = np.quantile(np.array(losses, dtype=np.float64), quantile)
    assert temperature(torch.tensor(losses), quantile) == pytest.approx(expected, rel=1e-6)


@given(LOSSES)
def test_weights_follow_the_papers_formula(losses):
    tau = float(np.median(np.array(losses, dtype=np.float64)))
    weights = SampleWeights.from_losses(torch.tensor(losses))
    assert weights.temperature == pytest.approx(tau, rel=1e-6)
    np.testing.assert_allclose(weights.weights.numpy(), np.exp(-np.array(losses) / tau), rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_float32_whatever_the_losses_are(dtype):
    losses = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    weights = flow_weights(losses, 1.0)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), np.exp([-0.5, -1.0, -2.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "data set is empty"),
        ([1.0, float("nan"), 2.0, float("inf")], "2 of 4 losses are NaN or infinite: samples 1, 3"),
        ([1.0, -0.5], "1 of 2 losses are negative: samples 1"),
        ([0.0, 0.0, 0.0, 1.0], "3 of 4 losses are exactly 0.*folds=5"),
    ],
)
def test_unusable_losses_are_an_error_that_names_samples_and_fix(losses, message):
    with pytest.raises(ValueError, match=message):
        SampleWeights.from_losses(torch.tensor(losses))


@pytest.mark.parametrize(
    ("function", "value", "message"),
    [(flow_weights, tau, "positive finite") for tau in (0.0, -1.0, float("nan"), float("inf"))]
    + [(temperature, 1.5, "from 0 to 1")],
)
def test_unusable_temperatures_and_quantiles_are_errors(function, value, message):
    with pytest.raises(ValueError, match=message):
        function(torch.ones(2), value)


def test_of_gives_the_weights_of_the_samples():
    weights = SampleWeights.from_losses(torch.arange(1.0, 11.0))
    assert torch.equal(weights.of(torch.tensor([9, 0])), weights.weights[[9, 0]])
    with pytest.raises(IndexError):
        weights.of(torch.tensor([10]))


def test_a_lookup_does_not_grow_with_the_data_set():
    """Counted, not timed: the operations of a look-up touch B elements, whatever n is."""

    class Elements(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.made += out.numel()
            return out

    made: list[int] = []
    for n in (100, 100_000):
        weights = SampleWeights.from_losses(torch.rand(n) + 0.1)
        with Elements() as mode:
            weights.of(torch.arange(8))
        made.append(mode.made)
    assert 8 <= made[0] == made[1]


def test_summary_matches_numpy():
    weights = SampleWeights.from_losses(torch.rand(501) + 0.01)
    w = weights.weights.numpy().astype(np.float64)
    summary = weights.summary()
    assert summary["flow/mean_weight"] == pytest.approx(w.mean())
    assert summary["flow/effective_sample_size"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert summary["flow/effective_sample_fraction"] == pytest.approx(summary["flow/effective_sample_size"] / 501)
    assert summary["flow/weight_q25"] == pytest.approx(np.quantile(w, 0.25))
    assert summary["flow/weight_q50"] == pytest.approx(np.exp(-1), rel=1e-5)


@pytest.mark.parametrize("wrong", [0.1, 0.3, 0.6])
def test_the_temperature_of_a_mixture_is_the_median_of_its_clean_part(wrong):
    rng = np.random.default_rng(0)
    is_wrong = rng.random(4000) < wrong
    losses = np.where(is_wrong, rng.normal(4, 0.6, 4000), rng.normal(1, 0.2, 4000)).clip(0)
    losses = torch.tensor(losses, dtype=torch.float32)
    found = mixture_temperature(losses[torch.randperm(4000)])
    assert found == pytest.approx(float(np.median(losses[~is_wrong])), rel=0.01)
    assert SampleWeights.from_losses(losses, "mixture").temperature == pytest.approx(found)


def test_a_mixture_of_equal_losses_is_their_median():
    assert mixture_temperature(torch.full((5,), 0.5)) == 0.5


def test_the_control_gives_all_samples_flows_mean_weight():
    losses = torch.tensor([0.1, 0.5, 2.0, 9.0])
    expected = SampleWeights.from_losses(losses).weights.mean()
    control = SampleWeights.from_losses(losses, weighting="mean")
    torch.testing.assert_close(control.weights, expected.expand(4))
    control.verify()


def test_excess_surprise_and_dropped_labels_by_hand():
    losses, beside = torch.tensor([0.2, 1.0, 3.0]), {"entropies": torch.tensor([0.5, 0.4, 0.1])}
    excess = SampleWeights.from_losses(losses, weighting="excess", beside=beside)
    np.testing.assert_allclose(excess.weights, np.exp([0, -0.6, -2.9]), rtol=1e-6)
    excess.save("weights.safetensors")
    loaded = SampleWeights.load("weights.safetensors")
    assert torch.equal(loaded.weights, excess.weights) and loaded.weighting == "excess"
    issues = {"issues": torch.tensor([0, 1, 0], dtype=torch.uint8)}
    assert SampleWeights.from_losses(losses, weighting="drop", beside=issues).weights.tolist() == [1, 0, 1]
    right = torch.tensor([0.9, 0.1, 1.0])
    posterior = SampleWeights.from_losses(losses, weighting="posterior", beside={"right": right})
    assert torch.equal(posterior.weights, right) and posterior.weights.data_ptr() != right.data_ptr()
    with pytest.raises(
        ValueError, match="needs a linear probe's probabilities that labels are right"
    ):  # a file of an earlier version
        SampleWeights.from_losses(losses, weighting="posterior", beside={})
    with pytest.raises(ValueError, match="needs a linear probe's label issues"):
        SampleWeights.from_losses(losses, weighting="drop")
