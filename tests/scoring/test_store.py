"""Blocks that an interrupted scoring has left are found; damaged and foreign ones count as absent."""

import pytest
import torch

from flow_lightning.files import save_tensors
from flow_lightning.scoring.score import Block
from flow_lightning.scoring.store import BlockStore, batches_to_check, first_difference

BATCHES = [[2, 1], [0, 4], [3]]


def filled(folder) -> BlockStore:
    store = BlockStore(folder / "weights.safetensors", "key")
    store.add(0, Block(2, (torch.tensor([0, 4, 2, 1]), torch.tensor([0.0, 4.0, 2.0, 1.0]))))
    store.add(2, Block(3, (torch.tensor([3]), torch.tensor([3.0]))))
    return store


def test_blocks_come_in_order_until_one_is_missing(tmp_path):
    store = filled(tmp_path)
    blocks = list(BlockStore(tmp_path / "weights.safetensors", "key").blocks(BATCHES))
    assert [block.end for block in blocks] == [2, 3]
    assert torch.cat([block.values[1] for block in blocks]).tolist() == [0.0, 4.0, 2.0, 1.0, 3.0]
    store._path(0).unlink()
    assert list(store.blocks(BATCHES)) == []
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_other_data_or_another_model_count_as_absent(tmp_path):
    filled(tmp_path)
    assert list(BlockStore(tmp_path / "weights.safetensors", "other").blocks(BATCHES)) == []


@pytest.mark.parametrize(
    ("end", "index"), [(2, [0, 4, 2, 3]), (4, [0, 4, 2, 1, 3]), (0, []), (1, [2, 2]), (10**9, [0, 1, 2])]
)
def test_blocks_of_other_batches_count_as_absent(tmp_path, end, index):
    store = filled(tmp_path)
    store.add(0, Block(end, (torch.tensor(index, dtype=torch.long), torch.zeros(len(index)))))
    assert list(store.blocks(BATCHES)) == []


def test_a_damaged_block_counts_as_absent(tmp_path):
    store = filled(tmp_path)
    path = store._path(2)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert [block.end for block in store.blocks(BATCHES)] == [2]
    save_tensors(path, "flow_lightning.ScoringBlock/1", {}, {"key": "key"})
    assert [block.end for block in store.blocks(BATCHES)] == [2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_not_kept(tmp_path, value):
    store = BlockStore(tmp_path / "weights.safetensors", "key")
    store.add(0, Block(1, (torch.tensor([2, 1]), torch.tensor([1.0, value]))))
    assert not store.folder.exists()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flow_lightning.files.write_bytes", full)
    with pytest.raises(OSError, match=r"weights\.safetensors\.blocks.*No space left.*Make room"):
        filled(tmp_path)


def test_the_first_and_the_last_batch_are_checked():
    chosen = batches_to_check([[i] for i in range(100)])
    assert len(chosen) == 8 and chosen[0] == [0] and chosen[-1] == [99]
    assert batches_to_check([[5]]) == [[5]]


INDEX = torch.tensor([3, 3, 8])


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        ([1.0, 2.0, 4.0], ""),
        ([1.0005, 2.0, 4.004], ""),
        ([1.0, 2.0, 4.1], "sample 8: 4.1 now, 4 in the file"),
        ([1.0, 9.0, 4.1], "sample 3: 9 now, 2 in the file"),
        ([1.0, torch.nan, 4.0], "sample 3: nan now, 2 in the file"),
        ([1.0, 2.0], "[2] values now, [3] in the file"),
    ],
)
def test_a_difference_names_the_sample_and_both_numbers(now, difference):
    before = torch.tensor([1.0, 2.0, 4.0])
    assert first_difference((INDEX, before), (INDEX[: len(now)], torch.tensor(now))) == difference


def test_the_largest_difference_of_features_is_named():
    before, now = torch.ones(3, 5), torch.ones(3, 5)
    now[2, 3] = 1.5
    assert first_difference((INDEX, before), (INDEX, now)) == "sample 8: 1.5 now, 1 in the file"
