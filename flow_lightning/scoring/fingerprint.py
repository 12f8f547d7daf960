"""Short hashes that tell whether a data set or a model is still the one that was scored.

In: data set, or parameters. Out: 32 hexadecimal digits. Next: `samples.py`.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from flow_lightning.distributed import whole

_SAMPLES = 32
_ELEMENTS = 1024


def model_fingerprints(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Hash each parameter and buffer of a model: name, shape and up to 1,024 evenly spaced elements.

    Training moves all elements of a tensor that it moves, so a sample of them is enough, and the same on any device.
    Types do not count: a bfloat16 run and a float32 run of one checkpoint differ in the elements' values alone.

    Args:
        state: A `state_dict`; call it on every rank, for tensors in shards are gathered.

    Returns:
        32 hexadecimal digits, by name.
    """
    return {name: sample_fingerprint(_some(name, value)) for name, value in state.items() if isinstance(value, Tensor)}


def join_fingerprints(fingerprints: Mapping[str, str], exclude: tuple[str, ...] = ()) -> str:
    """Join the hashes of a model's tensors to one, without those whose name starts with one of `exclude`.

    Returns:
        32 hexadecimal digits; nothing if there are no hashes.
    """
    kept = {name: value for name, value in fingerprints.items() if not name.startswith(exclude)}
    return sample_fingerprint(kept) if kept else ""


def check_same_model(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse, with a ValueError, a module that is not the pre-trained one of the hashes `before`, by name."""
    if changed := [name for name, value in before.items() if now.get(name) != value]:
        raise ValueError(
            f"The module is not the pre-trained one that the fit started from: {changed[0]} differs. Build it from "
            "the same weights (random parts need the same seed)."
        )


def _some(name: str, value: Tensor) -> tuple[str, tuple[int, ...], Tensor]:
    flat = whole(value).detach().flatten()
    last, count = max(flat.numel() - 1, 0), min(_ELEMENTS, flat.numel())
    positions = torch.linspace(0, last, count, dtype=torch.float64).long()
    return name, tuple(value.shape), flat[positions.to(flat.device)].double()


def inspect_dataset(dataset: Any) -> tuple[str, bool]:
    """Read up to 32 evenly spaced samples of a map-style data set, half of them twice.

    Samples are taken as the data set gives them, so that a change of the transforms shows, too. A change of a few
    samples of a large data set that alters neither length nor targets can go unseen. So can a random flip that happens
    not to differ in any of the 16 samples (one case in 65,536).

    Returns:
        The fingerprint, 32 hexadecimal digits: hash of length, all targets if the data set lists them, and samples.
        Whether two readings of a sample differ: its transforms are random then.
    """
    digest = hashlib.blake2b(digest_size=16)
    length, is_random = len(dataset), False
    _update(digest, (length, targets_of(dataset)))
    positions = sorted({round(i * (length - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)} if length else ())
    for order, position in enumerate(positions):
        seed_generators(position)  # random transforms then draw the same in each fit, and on each rank
        sample = sample_fingerprint(dataset[position])
        _update(digest, sample)
        if order % 2 == 0 and not is_random:
            is_random = sample_fingerprint(dataset[position]) != sample
    return digest.hexdigest(), is_random


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy and, on the CPU, torch: those of data; devices take far longer to seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)


def sample_fingerprint(sample: Any) -> str:
    """Hash one sample."""
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, sample)
    return digest.hexdigest()


def targets_of(dataset: Any) -> Any:
    """Return the targets that a data set lists, by sample, whatever wraps it; None if it lists none."""
    while not hasattr(dataset, "targets") and hasattr(dataset, "dataset") and not hasattr(dataset, "indices"):
        dataset = dataset.dataset
    if isinstance(dataset, Subset):
        inner = targets_of(dataset.dataset)
        targets = None if inner is None else [inner[i] for i in dataset.indices]
    else:
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
