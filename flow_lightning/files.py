"""Files that are either whole or absent: bytes, safetensors with a checksum, checkpoints. Never pickle.

In: content and a path. Out: the file, or an error that names it. Next: `run.py`, `scoring/store.py`.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flow_lightning.optional import optional_import

#: A fixed suffix for large files: the rerun of a killed run replaces what that left, and no part stays on the disk.
_PART = "part"


@contextmanager
def _replacing(path: Path, suffix: str) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which takes that name once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{suffix}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically, in a folder that is made if need be; an OSError leaves an older file as it was."""
    with _replacing(Path(path), uuid4().hex) as file:  # another run may write the same file at the same time
        file.write(content)


def save_array(path: str | Path, values: Tensor) -> None:
    """Write a tensor as `.npy`, which `numpy.load` reads without pickle, atomically and without a copy in memory."""
    with _replacing(Path(path), uuid4().hex) as file:
        np.save(file, values.numpy(), allow_pickle=False)


def write_csv(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table as CSV in UTF-8, atomically; floats have six digits, None is an empty cell."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)
    write_bytes(path, content.getvalue().encode("utf-8", "replace"))


def write_parquet(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Write a table as Parquet, atomically; an ImportError names what installs pyarrow, if it is not there."""
    arrow, parquet = (optional_import(name, "language", "Parquet files") for name in ("pyarrow", "pyarrow.parquet"))
    buffer = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(dict(columns)), buffer)
    write_bytes(path, buffer.getvalue().to_pybytes())


def save_pixels(path: Path, shape: tuple[int, ...], parts: Iterable[bytes], last: str) -> None:
    """Write uint8 values as `.npy`, part by part, atomically, and a text behind them, which `numpy.load` ignores."""
    with _replacing(path, _PART) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part)
        file.write(last.encode())


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time make a file, while others wait here; a killed one lets go.

    What waits is the open temporary file of `save_pixels`: it takes the name `path` in the end, or is removed here.
    """
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{_PART}")
    while True:
        with open(part, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(part, file):  # the process before has given it its name
                continue
            try:
                yield
            finally:
                if _is_at(part, file):
                    part.unlink()
            return


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Tell whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints such that a killed run leaves the one before, or the new one, never a part.

    Lightning's own may copy from the system's folder of temporary files. The command line uses this one; elsewhere pass
    `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; one on remote storage is left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with _replacing(Path(path), _PART) as file:
            torch.save(checkpoint, file)


def check_writable(*folders: str | Path) -> None:
    """Raise OSError if a folder cannot be made, or takes no file of some MiB."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**23))
        except OSError as error:
            raise OSError(f"{folder.absolute()} cannot be written to ({error}). Choose another folder.") from error


def save_tensors(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with a checksum, atomically; `load_tensors` asks for the same `file_format`."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    words = {"format": file_format, **metadata}
    write_bytes(path, save(content, {**words, "checksum": _checksum(content, words)}))


def load_tensors(path: str | Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata that `save_tensors` wrote; a ValueError, which names no file, if they are others."""
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
