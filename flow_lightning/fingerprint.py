"""Fingerprints: short hashes that tell whether a data set or a model is still the one that was scored."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_SAMPLES = 32
_ELEMENTS = 1024


def model_fingerprint(state: Mapping[str, Tensor], exclude: tuple[str, ...] = ()) -> str:
    """Hash the parameters and buffers of a model: names, shapes and up to 1,024 evenly spaced elements of each.

    Training moves all elements of a tensor that it moves, so a sample of them is enough, and the same on any device.
    Types do not count: a bfloat16 run and a float32 run of one checkpoint differ in the elements' values alone.

    Args:
        state: A `state_dict`.
        exclude: Prefixes of the names to leave out, for instance of a head that is newly made each time.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor) or name.startswith(exclude or ("\0",)):
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # all ranks must call for that
        flat = whole.detach().flatten()
        positions = torch.linspace(
            0, max(flat.numel() - 1, 0), min(_ELEMENTS, flat.numel()), dtype=torch.float64
        ).long()
        _update(digest, (name, tuple(value.shape), flat[positions.to(flat.device)].double()))
    return digest.hexdigest()


def dataset_fingerprint(dataset: Any) -> str:
    """Hash a map-style data set: its length, all targets if it lists them, and the content of 32 evenly spaced samples.

    Samples are taken as the data set gives them, so that a change of the transforms shows, too. A change of a few
    samples of a large data set that alters neither length nor targets can go unseen.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    length = len(dataset)
    _update(digest, (length, _targets(dataset)))
    for index in sorted({round(i * (length - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)} if length else ()):
        _update(digest, dataset[index])
    return digest.hexdigest()


def sample_fingerprint(sample: Any) -> str:
    """Hash one sample."""
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, sample)
    return digest.hexdigest()


def is_random(dataset: Any) -> bool:
    """Tell whether two readings of some sample differ: transforms are random then.

    Looks at up to 16 samples, so that a flip of one half goes unseen in one of 65,536 cases.
    """
    length = len(dataset)
    some = sorted({round(i * (length - 1) / 15) for i in range(16)} if length else ())
    return any(sample_fingerprint(dataset[index]) != sample_fingerprint(dataset[index]) for index in some)


def _targets(dataset: Any) -> Any:
    while not hasattr(dataset, "targets") and hasattr(dataset, "dataset") and not hasattr(dataset, "indices"):
        dataset = dataset.dataset
    targets = getattr(dataset, "targets", None)
    try:
        numbers = np.asarray(targets)
    except ValueError:  # lists of different lengths
        return targets
    return targets if numbers.dtype == object else numbers


def _update(digest: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        array = value.detach().cpu()
        _update(digest, (array.float() if array.dtype == torch.bfloat16 else array).numpy())
    elif isinstance(value, np.ndarray) and value.dtype == object:
        _update(digest, value.tolist())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _update(digest, sorted((str(key), item) for key, item in value.items()) if value else "{}")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif hasattr(value, "tobytes"):  # a PIL image
        digest.update(value.tobytes())
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    else:  # an object whose repr may hold an address: its class alone is stable
        digest.update(type(value).__qualname__.encode())
