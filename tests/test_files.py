"""A file is whole or absent, whatever goes wrong while it is written."""

import os
import resource
import signal

import pytest
import torch

from flow_lightning.files import AtomicCheckpointIO, check_writable, write_bytes


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    write_bytes(tmp_path / "new" / "file", b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "new" / "file", b"new")
    assert (tmp_path / "new" / "file").read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "a.ckpt"
    io.save_checkpoint({"a": torch.ones(2)}, path)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        io.save_checkpoint({"a": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    (tmp_path / "new" / ".a.ckpt.part").write_bytes(bytes(10_000))  # what a killed run leaves
    io.save_checkpoint({"a": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.zeros(2))
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_a_folder_that_can_be_written_to_is_left_as_it_was_and_one_that_is_none_is_named(tmp_path):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run cannot be written to.*Choose another folder"):
        check_writable(tmp_path / "file" / "run")


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files is met by the same error as a full disk: the write does not succeed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path} cannot be written to"):
            check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
