"""Results of scoring on disk: block by block while it runs, whole when it is done."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from flow_lightning.tensor_files import load_tensors, save_tensors

#: A part of the keys, so that files of an older format are left alone.
FORMAT = "flow_lightning.ScoreStore/2"
_WHOLE = "whole.safetensors"


def default_cache() -> Path | None:
    """Return the user's cache folder: `$FLOW_LIGHTNING_CACHE`, or `flow_lightning` below `$XDG_CACHE_HOME` or ~/.cache.

    Returns:
        A path that need not exist; None if `FLOW_LIGHTNING_CACHE` is set to nothing: no cache.
    """
    named = os.environ.get("FLOW_LIGHTNING_CACHE")
    if named is None:
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flow_lightning"
    return Path(named).expanduser() if named else None


class ScoreStore:
    """The results of one sweep over a data set, in a folder of their own.

    While the sweep runs, each block of batches is a part; when it is done, the whole takes the place of the parts. All
    files are written atomically, so that a killed run leaves parts that are whole, and two runs that write the same
    results do not spoil each other. Only rank 0 reads and writes.

    Args:
        folder: The cache folder.
        key: What the results depend on, as a hash.
        optional: Whether to go on without it, with a warning, once it cannot be written to.
    """

    def __init__(self, folder: str | Path, key: str, optional: bool = False) -> None:
        self.folder = Path(folder) / key
        self.key = key
        self.optional = optional
        self._usable = True

    def whole(self) -> dict[str, Tensor] | None:
        """Read the results of a finished sweep; None if there are none.

        Raises:
            ValueError: If the file is damaged or belongs to something else.
        """
        path = self.folder / _WHOLE
        return self._read(path) if path.exists() else None

    def finish(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the results of a finished sweep, and remove its parts."""
        self._write(self.folder / _WHOLE, tensors)
        if not self._usable:  # the whole has found no room: the parts are still worth having
            return
        for part in self.folder.glob("part-*.safetensors"):
            part.unlink(missing_ok=True)  # another run of the same sweep may have been quicker

    def add(self, start: int, end: int, values: Sequence[Tensor]) -> None:
        """Write the values of batches `start` to `end`."""
        tensors = {f"value{i}": value for i, value in enumerate(values)} | {"end": torch.tensor(end)}
        self._write(self._part(start), tensors)

    def parts(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield what an interrupted sweep has left, from the first batch on: batches done so far, and their values.

        Args:
            batches: The batches of the sweep; the first value of a part must hold their samples.

        Raises:
            ValueError: If a file is damaged or belongs to something else.
        """
        done = 0
        while (path := self._part(done)).exists():
            tensors = self._read(path)
            end = int(tensors.pop("end", torch.tensor(-1)))
            values = tuple(tensors[name] for name in sorted(tensors))
            samples = torch.tensor(list(chain.from_iterable(batches[done:end])))
            if not values or not done < end <= len(batches) or not torch.equal(values[0].sort()[0], samples.sort()[0]):
                raise self._error(path, "its samples are not those of this data set")
            done = end
            yield done, values

    def clear(self) -> None:
        """Remove all results."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def _part(self, start: int) -> Path:
        return self.folder / f"part-{start:010d}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if not self._usable:
            return
        try:
            save_tensors(path, FORMAT, tensors, {"key": self.key})
        except OSError as error:
            message = f"The cache cannot be written to: {path.absolute()} ({error}). Make room, or pass cache=False."
            if not self.optional:
                raise OSError(message) from error
            warnings.warn(message, stacklevel=2)
            self._usable = False

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            tensors, metadata = load_tensors(path, FORMAT)
            if metadata != {"key": self.key}:
                raise ValueError(f"it says {metadata}, not the key {self.key!r}")
        except ValueError as error:
            raise self._error(path, str(error)) from error
        return tensors

    @staticmethod
    def _error(path: Path, why: str) -> ValueError:
        return ValueError(f"{path} is not a usable file of the cache: {why}. Delete it, or score anew (--force).")
