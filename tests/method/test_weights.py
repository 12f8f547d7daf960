import json
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from flow_lightning.files import save_tensors
from flow_lightning.method.flow import WEIGHTINGS, keep_below
from flow_lightning.method.weights import SampleWeights, TokenWeights

OFFSETS = torch.tensor([0, 3, 3, 4, 9])


def losses(n=9, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 4 + 0.01


def test_temperature_and_weights_are_numpys():
    weights = TokenWeights.from_losses(losses(), OFFSETS)
    tau = np.median(losses().numpy())
    assert weights.temperature == pytest.approx(tau)
    np.testing.assert_allclose(weights.weights.numpy(), np.exp(-losses().numpy() / tau), atol=1e-3)


@pytest.mark.parametrize("index", [[0], [3, 0, 3], [1], [2, 1, 3], [1, 1], []])
def test_of_joins_the_tokens_of_the_samples(index):
    weights = TokenWeights.from_losses(losses(), OFFSETS)
    parts = [weights.weights[OFFSETS[i] : OFFSETS[i + 1]] for i in index]
    expected = torch.cat(parts) if parts else torch.zeros(0)
    torch.testing.assert_close(weights.of(torch.tensor(index, dtype=torch.long)), expected)


def test_half_precision_where_it_moves_no_weight_by_more_than_a_thousandth():
    many = losses(100_000)
    stored = TokenWeights.from_losses(many, torch.tensor([0, 100_000]))
    assert stored.losses.dtype == torch.float16
    assert (stored.weights - torch.exp(-many / stored.temperature)).abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        (torch.tensor([0.1, 1.0, 1e6]), {}),  # too large for half precision
        (torch.tensor([2.49999, 1.0, 3.0]), {"temperature": 2.5, "weighting": "threshold"}),  # rounds to the bound
        (torch.tensor([50.001, 50.0, 49.999]), {"temperature": 1e-3, "weighting": "flow"}),
    ],
)
def test_full_precision_where_half_would_move_a_weight(values, chosen):
    stored = TokenWeights.from_losses(values, torch.tensor([0, 3]), **chosen)
    threshold = chosen.get("weighting") == "threshold"
    exact = keep_below(values, 2.5) if threshold else torch.exp(-values / stored.temperature)
    assert (stored.weights - exact).abs().max() <= 1e-3


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setitem(WEIGHTINGS, "square", lambda losses, tau: (losses / tau) ** 2)
    weights = SampleWeights.from_losses(torch.tensor([1.0, 2.0, 4.0]), weighting="square")
    assert weights.weights.tolist() == [0.25, 1.0, 4.0]
    weights.verify()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'flow', 'mean', 'posterior', 'threshold'"):
        TokenWeights.from_losses(losses(), OFFSETS, weighting="no such")


@pytest.mark.parametrize(
    "make", [lambda *args, **kwargs: SampleWeights.from_losses(args[0], **kwargs), TokenWeights.from_losses]
)
def test_a_file_gives_back_every_bit(make, tmp_path):
    weights = make(losses(), OFFSETS, fingerprint={"dataset": "a", "reference": "b"})
    weights.save(tmp_path / "new" / "w.safetensors")
    assert comparable(type(weights).load(tmp_path / "new" / "w.safetensors")) == comparable(weights)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_a_file_of_tokens_holds_nothing_twice(tmp_path):
    TokenWeights.from_losses(losses(100_000), torch.tensor([0, 100_000])).save(tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size < 2 * 100_000 + 1000


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"losses": torch.ones(3), "offsets": torch.tensor([0, 2])}, "do not divide"),
        ({"losses": torch.ones(3), "offsets": torch.tensor([0, 5, 3])}, "do not divide"),
        ({"losses": torch.ones(3).long(), "offsets": torch.tensor([0, 3])}, "int64"),
        ({"losses": -torch.ones(3), "offsets": torch.tensor([0, 3])}, "negative"),
        ({"losses": torch.ones(3)}, "offsets"),
    ],
)
def test_a_file_whose_content_does_not_fit_is_refused(tensors, message, tmp_path):
    metadata = {"temperature": "1.0", "fingerprint": "{}", "weighting": "flow"}
    save_tensors(tmp_path / "w.safetensors", "flow_lightning.TokenWeights/2", tensors, metadata)
    with pytest.raises(ValueError, match=message):
        TokenWeights.load(tmp_path / "w.safetensors")


def test_files_of_sequences_and_of_tokens_are_not_mixed_up(tmp_path):
    SampleWeights.from_losses(losses()).save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="SampleWeights"):
        TokenWeights.load(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No weights file.*`score` writes one"):
        TokenWeights.load(tmp_path / "absent.safetensors")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the loader ran code from a file",))


THREE = torch.tensor([0.5, 1.0, 2.0])
WEIGHTS = {
    "sample weights": SampleWeights.from_losses(THREE),
    "token weights": TokenWeights.from_losses(THREE, torch.tensor([0, 2, 3])),
}


@pytest.fixture(params=WEIGHTS)
def saved(request, tmp_path):
    """A function that loads a file, the file, and its content."""
    weights, path = WEIGHTS[request.param], tmp_path / "file"
    weights.save(path)
    return lambda: type(weights).load(path), path, path.read_bytes()


def huge_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + content[8:]


def lying_header(content: bytes) -> bytes:
    """Tensors said to lie outside the file."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [0, 2**40]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


HOSTILE = {
    "empty": lambda content: b"",
    "pickle": lambda content: pickle.dumps(Bomb()),
    "torch": lambda content: b"PK\x03\x04" + content,
    "huge header": huge_header,
    "lying header": lying_header,
    "foreign": lambda content: save({"losses": torch.zeros(3)}),
    "half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_files_are_refused_and_left_as_they_are(saved, attack):
    load, path, content = saved
    load()
    path.write_bytes(HOSTILE[attack](content))
    with pytest.raises(ValueError, match=r"not a usable weights file.*Delete it"):
        load()
    assert path.read_bytes() == HOSTILE[attack](content)


def test_no_damage_gets_through_unseen_or_as_another_error(saved):
    """Any bytes changed, cut or put in: a clear error, or the very content that was written."""
    load, path, content = saved
    written = comparable(load())

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(content)), st.integers(0, 8), st.binary(max_size=8))
    def damaged(start, length, put_in):
        path.write_bytes(content[:start] + put_in + content[start + length :])
        try:
            found = load()
        except ValueError as error:
            assert "usable" in str(error)
        else:
            assert comparable(found) == written

    damaged()


def comparable(loaded):
    """Return what was loaded, in lists."""
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(loaded).items()}


def test_weights_that_do_not_follow_from_the_losses_are_refused(tmp_path):
    weights = SampleWeights.from_losses(torch.tensor([0.5, 1.0, 2.0]))
    weights.weights[1] = 0.9
    weights.save(tmp_path / "w")
    with pytest.raises(ValueError, match="not exp"):
        SampleWeights.load(tmp_path / "w")
