import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flow_lightning.method.flow import effective_sample_size, flow_weights, temperature
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


def test_the_median_sample_weighs_one_over_e():
    weights = SampleWeights.from_losses(torch.tensor([0.1, 0.7, 3.0])).weights
    assert weights[1].item() == pytest.approx(np.exp(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_float32_whatever_the_losses_are(dtype):
    losses = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    weights = flow_weights(losses, 1.0)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), np.exp([-0.5, -1.0, -2.0]), rtol=1e-6)


def test_a_given_temperature_is_taken():
    assert SampleWeights.from_losses(torch.tensor([1.0, 2.0]), temperature=0.5).temperature == 0.5


def test_effective_sample_size_is_kishs():
    w = np.random.default_rng(0).random(100)
    assert effective_sample_size(torch.from_numpy(w)) == pytest.approx(w.sum() ** 2 / (w**2).sum())


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


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_temperature_is_an_error(tau):
    with pytest.raises(ValueError, match="positive finite"):
        flow_weights(torch.ones(2), tau)


def test_unusable_quantile_is_an_error():
    with pytest.raises(ValueError, match="from 0 to 1"):
        temperature(torch.ones(2), 1.5)


def test_file_gives_back_every_bit(tmp_path):
    weights = SampleWeights.from_losses(torch.rand(1001), fingerprint={"dataset": "a", "reference": "b"})
    weights.save(tmp_path / "new" / "weights.safetensors")
    loaded = SampleWeights.load(tmp_path / "new" / "weights.safetensors")
    assert torch.equal(loaded.losses, weights.losses) and torch.equal(loaded.weights, weights.weights)
    assert (loaded.temperature, loaded.fingerprint) == (weights.temperature, weights.fingerprint)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.safetensors"]


def test_absent_file_is_an_error_that_says_what_writes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="`score` writes one"):
        SampleWeights.load(tmp_path / "none")


def test_foreign_damaged_and_inconsistent_files_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = SampleWeights.from_losses(torch.rand(64))
    weights.save(path)
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-10],
        "garbage": b"not safetensors at all",
        "empty": b"",
        "flipped": content[:-5] + bytes([content[-5] ^ 0x40]) + content[-4:],
    }
    for name, changed in damaged.items():
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="not a usable weights file"):
            SampleWeights.load(path)
        assert path.read_bytes() == changed, name
    save_file({"losses": weights.losses, "weights": weights.weights}, path)
    with pytest.raises(ValueError, match="format is None"):
        SampleWeights.load(path)


def test_lookup_gives_the_weights_of_the_samples():
    weights = SampleWeights.from_losses(torch.arange(1.0, 11.0))
    assert torch.equal(weights.lookup(torch.tensor([9, 0])), weights.weights[[9, 0]])
    with pytest.raises(IndexError):
        weights.lookup(torch.tensor([10]))


def test_ten_million_samples_take_at_most_100_mb():
    weights = SampleWeights(torch.ones(1000), 1.0, torch.ones(1000))
    held = sum(tensor.nbytes for tensor in vars(weights).values() if isinstance(tensor, torch.Tensor))
    assert held / 1000 * 10_000_000 <= 100e6


def test_a_lookup_does_not_grow_with_the_data_set():
    """Counted, not timed: the operations of a look-up touch B elements, whatever n is."""
    from torch.utils._python_dispatch import TorchDispatchMode

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
            weights.lookup(torch.arange(8))
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
