"""Files of tensors: safetensors, never pickle, with a checksum, so that what is read is what was written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flow_lightning.files import write_bytes


def save_tensors(path: str | Path, file_format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file, atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: Where to write; missing folders are made.
        file_format: What the file is, by which `load_tensors` knows it again.
        tensors: Its content.
        metadata: Further content, in words.

    Returns:
        The checksum of the content.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    words = {"format": file_format, **metadata}
    found = checksum(content, words)
    write_bytes(path, save(content, {**words, "checksum": found}))
    return found


def load_tensors(path: str | Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that `save_tensors` wrote.

    Returns:
        Tensors and metadata.

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
    if metadata.pop("checksum", None) != checksum(tensors, metadata):
        raise ValueError("its content has changed since it was written (the checksum is another one)")
    del metadata["format"]
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash tensors, on the CPU, and metadata: 32 hexadecimal digits."""
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
