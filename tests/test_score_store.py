"""What is written is found; what is damaged, foreign or hostile is refused and says what to do."""

import json
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from flow_lightning.score_store import ScoreStore, default_cache
from flow_lightning.token_weighting import TokenWeights
from flow_lightning.weighting import SampleWeights

BATCHES = [[2, 1], [0, 4], [3]]


def filled(folder) -> ScoreStore:
    store = ScoreStore(folder, "key")
    store.add(0, 2, (torch.tensor([0, 4, 2, 1]), torch.tensor([0.0, 4.0, 2.0, 1.0])))
    return store


def test_parts_are_found_in_order_until_one_is_missing(tmp_path):
    store = filled(tmp_path)
    store.add(2, 3, (torch.tensor([3]), torch.tensor([3.0])))
    found = list(ScoreStore(tmp_path, "key").parts(BATCHES))
    assert [done for done, _ in found] == [2, 3]
    assert torch.cat([values[1] for _, values in found]).tolist() == [0.0, 4.0, 2.0, 1.0, 3.0]
    store._part(0).unlink()
    assert list(store.parts(BATCHES)) == []


def test_the_whole_takes_the_place_of_the_parts(tmp_path):
    store = filled(tmp_path)
    assert store.whole() is None
    store.finish({"losses": torch.arange(5.0)})
    assert list(store.parts(BATCHES)) == []
    assert ScoreStore(tmp_path, "key").whole()["losses"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [file.name for file in store.folder.iterdir()] == ["whole.safetensors"]
    store.clear()
    assert store.whole() is None


@pytest.mark.parametrize(
    ("start", "end", "index"), [(0, 2, [0, 4, 2, 3]), (0, 4, [0, 4, 2, 1, 3]), (0, 0, []), (0, 1, [2, 2])]
)
def test_parts_of_other_batches_are_refused(tmp_path, start, end, index):
    store = ScoreStore(tmp_path, "key")
    store.add(start, end, (torch.tensor(index, dtype=torch.long), torch.zeros(len(index))))
    with pytest.raises(ValueError, match=r"samples are not those of this data set.*--force"):
        list(store.parts(BATCHES))


def test_a_file_of_another_key_is_refused(tmp_path):
    filled(tmp_path).finish({"losses": torch.zeros(1)})
    (tmp_path / "key").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="is not a usable file of the cache"):
        ScoreStore(tmp_path, "other").whole()


def test_the_default_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOW_LIGHTNING_CACHE", "")
    assert default_cache() is None
    monkeypatch.setenv("FLOW_LIGHTNING_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("FLOW_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "flow_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "flow_lightning"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the loader ran code from a file",))


def sample_weights(path):
    SampleWeights.from_losses(torch.tensor([0.5, 1.0, 2.0])).save(path)
    return lambda: SampleWeights.load(path)


def token_weights(path):
    TokenWeights.from_losses(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 2, 3])).save(path)
    return lambda: TokenWeights.load(path)


def whole(path):
    store = ScoreStore(path.parent, "key")
    store.finish({"losses": torch.tensor([0.5, 1.0, 2.0])})
    path.write_bytes((store.folder / "whole.safetensors").read_bytes())

    def load():
        (store.folder / "whole.safetensors").write_bytes(path.read_bytes())
        return store.whole()

    return load


LOADERS = {"sample weights": sample_weights, "token weights": token_weights, "cache": whole}


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


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_files_are_refused(tmp_path, kind, attack):
    path = tmp_path / "file"
    load = LOADERS[kind](path)
    load()
    path.write_bytes(HOSTILE[attack](path.read_bytes()))
    with pytest.raises(ValueError, match=r"usable.*(Delete it|score anew)"):
        load()


@pytest.mark.parametrize("kind", LOADERS)
def test_no_damage_gets_through_unseen_or_as_another_error(tmp_path_factory, kind):
    """Any bytes changed, cut or put in: a clear error, or the very content that was written."""
    path = tmp_path_factory.mktemp("fuzz") / "file"
    load = LOADERS[kind](path)
    content, written = path.read_bytes(), comparable(load())

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
    content = loaded if isinstance(loaded, dict) else vars(loaded)
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in content.items()}


@pytest.mark.parametrize("kind", LOADERS)
def test_each_flipped_bit_is_seen(tmp_path, kind):
    """Also where the value would make a fine loss: a file has a checksum."""
    path = tmp_path / "file"
    load = LOADERS[kind](path)
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    assert len(content) > start + 8
    for position in range(start, len(content)):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(ValueError, match="checksum"):
                load()


def test_weights_that_do_not_follow_from_the_losses_are_refused(tmp_path):
    weights = SampleWeights.from_losses(torch.tensor([0.5, 1.0, 2.0]))
    weights.weights[1] = 0.9
    weights.save(tmp_path / "w")
    with pytest.raises(ValueError, match="not exp"):
        SampleWeights.load(tmp_path / "w")


def test_a_full_disk_is_an_error_or_where_the_cache_is_optional_a_warning(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flow_lightning.tensor_files.write_bytes", full)
    with pytest.raises(OSError, match=rf"cache cannot be written to: {tmp_path}/key/part.*No space"):
        filled(tmp_path)
    store = ScoreStore(tmp_path, "key", optional=True)
    with pytest.warns(UserWarning, match=rf"cache cannot be written to: {tmp_path}/key/part.*No space") as warned:
        store.add(0, 1, (torch.tensor([2, 1]),))
        store.add(1, 2, (torch.tensor([0, 4]),))
        store.finish({"losses": torch.zeros(5)})
    assert len(warned) == 1 and store.whole() is None


def test_parts_stay_where_the_whole_finds_no_room(tmp_path, monkeypatch):
    filled(tmp_path)
    store = ScoreStore(tmp_path, "key", optional=True)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flow_lightning.tensor_files.write_bytes", full)
    with pytest.warns(UserWarning, match="No space"):
        store.finish({"losses": torch.zeros(5)})
    assert [done for done, _ in store.parts(BATCHES)] == [2]
