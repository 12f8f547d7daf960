"""Identity: a hash of everything that a computation depends on, so that its result is found again, and only then.

A fingerprint (see `fingerprint`) tells on any machine whether data and model are still the same, from a sample of
them. An identity is stricter and cheaper to break: all values, the code of functions and classes, the size and time of
files. If it changes without need, the work is done once more; it must never stay when something that matters changed.
"""

import functools
import hashlib
import inspect
import os
import stat
import sys
import sysconfig
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
#: Attributes of every torch module that are no settings: tensors are seen by their values, hooks by no one.
_OF_TORCH = frozenset(vars(nn.Module()))
#: Rows and columns of a block whose bits are summed.
_SIDE = 2**11


class UnidentifiableError(TypeError):
    """A value of which one cannot tell whether it is the same next time."""


def identity(*values: Any) -> str:
    """Hash values, with all that is in them.

    Args:
        values: Data sets, transforms, functions, tensors, containers of them. A data set that defines
            `identity() -> str` is asked instead of looked into.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnidentifiableError: If a value cannot be looked into, for instance an open connection.

    Example:
        >>> identity([1, 2]) == identity([1, 2]), identity([1, 2]) == identity([2, 1])
        (True, False)
    """
    return _Walk().hash(values).hex()


def model_identity(module: nn.Module, exclude: tuple[str, ...] = ()) -> str:
    """Hash a model as it computes: all elements of parameters and buffers, settings and code of all submodules.

    Args:
        module: A module. Its attributes named in `not_in_losses`, such as the learning rate, do not count. Parameters
            in shards are gathered, one after the other, for which all ranks must call.
        exclude: Prefixes of the parameters and buffers that do not count.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnidentifiableError: See `identity`.
    """
    return _Walk().model(module, exclude).hex()


def checksums(tensor: Tensor) -> Tensor:
    """Add up the bits of a tensor along the rows and the columns of large blocks of it.

    Whichever element changes, two sums change, and so they do if elements change places.

    Args:
        tensor: Any shape, type and device. One in shards is gathered first, for which all ranks must call.

    Returns:
        Type and shape as a hash, then the sums, and the elements that are too few for a row, `[K]` int64, on the CPU.
    """
    head = int.from_bytes(
        hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=7).digest(), "big"
    )
    whole = tensor.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    if whole.is_complex():
        whole = torch.view_as_real(whole)
    bits = whole.flatten() if whole.dtype == torch.bool else whole.flatten().view(_integers(whole))
    in_rows = bits.numel() // _SIDE * _SIDE
    blocks = bits[:in_rows].view(-1, _SIDE).split(_SIDE)
    sums = [block.sum(dim, dtype=torch.int64) for block in blocks for dim in (0, 1)]
    return torch.cat([torch.tensor([head]), torch.cat([*sums, bits[in_rows:].long()]).cpu()])


def _integers(tensor: Tensor) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


class _Walk:
    """One walk through nested values; each value gives a digest, so that no two structures run into each other."""

    def __init__(self) -> None:
        self.above: dict[int, int] = {}  # objects that contain the one looked at: a cycle ends there
        self.classes: dict[int, bytes] = {}

    def hash(self, value: Any) -> bytes:
        if _is_plain(value):
            return _digest("plain", repr(value).encode(), *_file_states(value))
        if id(value) in self.above:
            return _digest("above", str(len(self.above) - self.above[id(value)]).encode())
        self.above[id(value)] = len(self.above)
        try:
            return self._look_into(value)
        finally:
            del self.above[id(value)]

    def model(self, module: nn.Module, exclude: tuple[str, ...] = ()) -> bytes:
        tensors = {
            name: checksums(value)
            for name, value in module.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not name.startswith(exclude or ("\0",))
        }
        parts = [_digest("part", name.encode(), self._settings(part)) for name, part in module.named_modules()]
        return _digest("model", self.hash(tensors), *parts)

    def _settings(self, module: nn.Module) -> bytes:
        """Hash code and settings of one module, without its tensors and submodules."""
        skipped = _OF_TORCH | frozenset(getattr(module, "not_in_losses", ()))
        private = isinstance(module, LightningModule)  # holds its Trainer, loggers and more there
        settings = {
            name: value
            for name, value in vars(module).items()
            if name not in skipped and not isinstance(value, Tensor) and not (private and name.startswith("_"))
        }
        return _digest("module", self._of_class(type(module)), self.hash(settings))

    def _look_into(self, value: Any) -> bytes:
        if isinstance(value, Tensor):
            return (
                self._array(value.detach().cpu().contiguous().view(torch.uint8).numpy(), value.dtype, value.shape)
                if value.ndim
                else _digest("number", f"{value.dtype}{value.item()!r}".encode())
            )
        if isinstance(value, np.memmap):
            where = str(value.filename)
            return _digest("memmap", f"{where}{value.offset}{value.dtype}{value.shape}".encode(), *_file_states(where))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return self._array(np.ascontiguousarray(value), value.dtype, value.shape)
        if isinstance(value, np.ndarray | list | tuple):
            return _digest(type(value).__name__, *map(self.hash, value))
        if isinstance(value, set | frozenset):
            return _digest("set", *sorted(map(self.hash, value)))
        if isinstance(value, Mapping):
            return _digest("mapping", *sorted(_digest("item", self.hash(k), self.hash(v)) for k, v in value.items()))
        if isinstance(value, Path):
            return _digest("path", str(value).encode(), *_file_states(str(value)))
        if isinstance(value, type):
            return self._of_class(value)
        if callable(value) and (code := self._of_function(value)) is not None:
            return code
        return self._of_object(value)

    def _array(self, array: Any, dtype: Any, shape: Any) -> bytes:
        return _digest("array", f"{dtype}{tuple(shape)}".encode(), memoryview(array).cast("B") if array.size else b"")

    def _of_class(self, value: type) -> bytes:
        """Hash the code of a class and those that it derives from; of installed ones the version of their package."""
        if id(value) in self.classes:
            return self.classes[id(value)]
        parts: list[bytes] = []
        for cls in value.__mro__:
            parts.append(f"{cls.__module__}.{cls.__qualname__}".encode())
            if _is_installed(cls):
                parts.append(_version(cls.__module__))
                continue
            for name, member in sorted(vars(cls).items()):
                member = getattr(member, "__func__", getattr(member, "fget", member))  # of a method or property
                if isinstance(member, types.FunctionType) or (_is_plain(member) and not name.startswith("__")):
                    parts += [name.encode(), self.hash(member)]
        self.classes[id(value)] = _digest("class", *parts)
        return self.classes[id(value)]

    def _of_function(self, value: Any) -> bytes | None:
        if isinstance(value, functools.partial):
            return _digest("partial", self.hash(value.func), self.hash(value.args), self.hash(value.keywords))
        if isinstance(value, types.MethodType):
            return _digest("method", self.hash(value.__func__), self.hash(value.__self__))
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.MethodWrapperType):
            return _digest("builtin", f"{value.__module__}.{value.__qualname__}".encode())
        if not isinstance(value, types.FunctionType):
            return None
        name = f"{value.__module__}.{value.__qualname__}".encode()
        if _is_installed(value):
            return _digest("function", name, _version(value.__module__))
        used = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        ours = {k: v for k, v in used.items() if _is_plain(v) or (inspect.isroutine(v) and not _is_installed(v))}
        rest = (value.__defaults__, value.__kwdefaults__, list(map(_content, value.__closure__ or ())), ours)
        return _digest("function", name, _code(value.__code__), self.hash(rest))

    def _of_object(self, value: Any) -> bytes:
        kind = self._of_class(type(value))
        own = getattr(value, "identity", None)
        if callable(own) and not isinstance(value, nn.Module):
            return _digest("own", kind, str(own()).encode())
        if isinstance(value, Enum):
            return _digest("enum", kind, value.name.encode())
        if type(value).__module__.startswith("transformers.") and type(value).__name__ == "GenerationConfig":
            return _digest("generation", kind)  # no part of a loss, and it holds a hash() that no other process has
        if isinstance(value, LightningDataModule):  # holds its Trainer, too
            return _digest("data", kind, self.hash({k: v for k, v in vars(value).items() if _is_plain(v)}))
        if isinstance(value, nn.Module):
            return self.model(value)
        if isinstance(value, Trainer) or type(value).__module__.startswith("torch.distributed."):
            return _digest("run", kind)  # how the run is spread over processes is no part of a loss
        if isinstance(value, torch.Generator):
            return _digest("generator", self.hash(value.get_state()))
        if type(value).__module__.startswith("datasets.") and hasattr(value, "_fingerprint"):
            return _digest("datasets", str(value._fingerprint).encode())
        try:
            made = value.__reduce_ex__(2)
        except Exception as error:
            raise UnidentifiableError(f"a {type(value).__module__}.{type(value).__qualname__} ({error})") from error
        return _digest(
            "object",
            kind,
            self.hash(made if isinstance(made, str) else [*made[1:3], *map(list, filter(None, made[3:5]))]),
        )


def _code(code: types.CodeType) -> bytes:
    return _digest("code", code.co_code, repr(code.co_names).encode(), *map(_constant, code.co_consts))


def _constant(value: Any) -> bytes:
    if isinstance(value, types.CodeType):
        return _code(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _digest(kind: str, *parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _is_plain(value: Any, depth: int = 5) -> bool:
    if type(value) in (list, tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return type(value) in _PLAIN


def _file_states(value: Any) -> list[bytes]:
    """Return size and time of change of all files that are named in a plain value."""
    if isinstance(value, list | tuple):
        return [state for item in value for state in _file_states(item)]
    if not isinstance(value, str) or os.sep not in value or len(value) > 4096 or "\n" in value or "\0" in value:
        return []
    try:
        found = os.stat(value)
    except OSError:
        return []
    return [f"{found.st_size} {found.st_mtime_ns}".encode()] if stat.S_ISREG(found.st_mode) else []


def _is_installed(value: Any) -> bool:
    """Tell whether a function or class comes with Python or an installed package, which has a version."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is None or module.__name__ == "__main__":
        return False
    return file is None or file.startswith(_INSTALLED)


@functools.cache
def _version(module: str | None) -> bytes:
    package = sys.modules.get((module or "").partition(".")[0])
    return str(getattr(package, "__version__", sys.version)).encode()
