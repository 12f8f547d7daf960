"""Files that are either whole or absent: bytes, safetensors with a checksum, checkpoints. Never pickle.

In: content and a path. Out: the file, or an error that names it. Next: `run.py`, `scoring/store.py`.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

#: How much is written to see whether a folder takes it.
_WRITTEN = 2**23


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: into a temporary file of the same folder, flushed to disk, then renamed.

    Raises:
        OSError: If the folder cannot be written to or the disk is full; an older file at `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another run may write the same file at the same time.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with _replacing(path, handle, temporary) as file:
        file.write(content)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Give a folder its name, in the place of an older one.

    Killed in between, it leaves the older one beside it: `last-before.ckpt`, which Lightning takes for `last`, too.
    """
    before = path.with_name(f"{path.stem}-before{path.suffix}")
    if path.exists():
        remove(before)
        path.rename(before)
    new.rename(path)
    remove(before)


@contextmanager
def _replacing(path: Path, handle: int, temporary: str | Path) -> Iterator[BinaryIO]:
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints such that a killed run leaves the one before, or the new one, never a part.

    Lightning's own goes through the system's folder of temporary files, and moving from there is a copy where that is
    another disk. The command line uses this one; elsewhere pass `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; one on remote storage is left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A fixed name: the rerun of a killed run replaces what that left, and no part of a model stays on the disk.
        temporary = path.with_name(f".{path.name}.part")
        handle = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        with _replacing(path, handle, temporary) as file:
            torch.save(checkpoint, file)


def check_writable(folder: str | Path, size: int = 0) -> None:
    """Write a temporary file of up to 8 MiB and remove it, so that a full disk or a read-only folder shows at once.

    Raises:
        OSError: If `folder` cannot be made or written to, or fewer than `size` bytes are free there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(min(size, _WRITTEN)))
            file.flush()
            os.fsync(file.fileno())
            free = shutil.disk_usage(folder).free + _WRITTEN
            if free < size:
                raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB are free")
    except OSError as error:
        raise OSError(
            f"{Path(folder).absolute()} cannot take the {size / 2**20:.0f} MiB that this run writes ({error}). Make "
            "room, or choose another folder."
        ) from error


def save_tensors(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with a checksum, atomically; `load_tensors` asks for the same `file_format`."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    words = {"format": file_format, **metadata}
    write_bytes(path, save(content, {**words, "checksum": _checksum(content, words)}))


def load_tensors(path: str | Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata that `save_tensors` wrote.

    Raises:
        ValueError: If the file is of another format, or its content is not what was written. The message says why, not
            which file and what to do about it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != file_format:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {file_format!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise ValueError("its content has changed since it was written (the checksum is another one)")
    del metadata["format"]
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
