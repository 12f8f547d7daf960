"""Identity: a hash of everything that a computation depends on, so that its result is found again, and only then.

A fingerprint (see `fingerprint`) tells on any machine whether data and model are still the same, from a sample of
them. An identity is stricter and cheaper to break: all values, the code of functions and classes, the size and time of
files. If it changes without need, the work is done once more; it must never stay when something that matters changed.
"""

import functools
import hashlib
import logging
import types
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from flow_lightning.checksums import checksums
from flow_lightning.used_code import (
    function_of,
    is_installed,
    is_of_python,
    used_attributes,
    used_globals,
    version,
)
from flow_lightning.used_files import distance, file_states, is_folder

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
#: Attributes of every torch module that are no settings: tensors are seen by their values, hooks by no one.
_OF_TORCH = frozenset(vars(nn.Module()))
#: Attributes of every LightningModule that belong to its run.
_OF_LIGHTNING = frozenset(vars(LightningModule())) | {
    "_hparams",
    "_hparams_initial",
    "_hparams_name",
    "_log_hyperparams",
}
#: Most objects, but for numbers and words, that are looked into.
_MOST = 3_000_000


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
    return _identified(lambda: _Walk().hash(values))


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
    return _identified(lambda: _Walk().model(module, exclude))


def _identified(walk: Callable[[], bytes]) -> str:
    try:
        return walk().hex()
    except UnidentifiableError:
        raise
    except Exception as error:  # of an object that does not bear being looked into
        raise UnidentifiableError(f"something that cannot be read ({type(error).__name__}: {error})") from error


class _Walk:
    """One walk through nested values; each value gives a digest, so that no two structures run into each other."""

    def __init__(self) -> None:
        self.above: dict[int, int] = {}  # objects that contain the one looked at, and their depth: a cycle ends there
        self.reached = 0  # least depth of an object above that was met again
        self.done: dict[tuple[int, tuple[str, ...]], tuple[Any, bytes]] = {}  # so that no object is looked into twice
        self.code: dict[int, tuple[Any, bytes]] = {}  # classes and functions that were looked into
        self.folders: tuple[str, ...] = ("",)  # that the objects above name, the working directory first
        self.count = 0

    def hash(self, value: Any) -> bytes:
        if _is_plain(value):
            return _digest("plain", repr(value).encode(), *file_states(value, self.folders))
        key = id(value), self.folders
        if key in self.done:
            return self.done[key][1]
        depth = len(self.above)
        if id(value) in self.above:
            self.reached = min(self.reached, self.above[id(value)])
            return _digest("above", str(depth - self.above[id(value)]).encode())
        self.count += 1
        if self.count > _MOST:
            raise UnidentifiableError(f"more than {_MOST:,} objects")
        self.above[id(value)] = depth
        outside, self.reached = self.reached, depth
        try:
            digest = self._look_into(value)
        finally:
            del self.above[id(value)]
        if self.reached >= depth:  # it is the same wherever it is met
            self.done[key] = value, digest
        self.reached = min(outside, self.reached)
        return digest

    def model(self, module: nn.Module, exclude: tuple[str, ...] = ()) -> bytes:
        tensors = {
            name: checksums(value)
            for name, value in (dict(module.named_buffers()) | module.state_dict(keep_vars=True)).items()
            if isinstance(value, Tensor) and not name.startswith(exclude or ("\0",))
        }
        parts = [_digest("part", name.encode(), self._settings(part)) for name, part in module.named_modules()]
        return _digest("model", self.hash(tensors), *parts)

    def _settings(self, module: nn.Module) -> bytes:
        """Hash code and settings of one module, without its parameters, buffers and submodules."""
        if isinstance(module, Metric):
            return _digest("metric", self._of_class(type(module)))  # counts what it has seen
        skipped = frozenset(getattr(module, "not_in_losses", ()))
        settings = {name: value for name, value in vars(module).items() if name not in skipped | _OF_TORCH}
        if isinstance(module, LightningModule):
            own = {name: value for name, value in module.hparams.items() if name not in skipped}
            settings = {name: value for name, value in settings.items() if name not in _OF_LIGHTNING} | {"hparams": own}
        return _digest("module", self._of_class(type(module)), self.hash(settings))

    def _look_into(self, value: Any) -> bytes:
        if isinstance(value, Tensor):
            value = value.full_tensor() if isinstance(value, DTensor) else value
            return (
                self._array(value.detach().cpu().contiguous().view(torch.uint8).numpy(), value.dtype, value.shape)
                if value.ndim
                else _digest("number", f"{value.dtype}{value.item()!r}".encode())
            )
        if isinstance(value, np.memmap):
            where = [str(value.filename), value.offset, distance(value), str(value.dtype), value.shape, value.strides]
            return _digest("memmap", repr(where).encode(), *file_states(where, self.folders))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return self._array(np.ascontiguousarray(value), value.dtype, value.shape)
        if isinstance(value, np.ndarray | list | tuple):
            return _digest(type(value).__name__, *map(self.hash, value))
        if isinstance(value, set | frozenset):
            return _digest("set", *sorted(map(self.hash, value)))
        if isinstance(value, Mapping):
            return _digest("mapping", *sorted(_digest("item", self.hash(k), self.hash(v)) for k, v in value.items()))
        if isinstance(value, Path):
            return _digest("path", str(value).encode(), *file_states(str(value), self.folders))
        if isinstance(value, type):
            return self._of_class(value)
        if callable(value) and (code := self._of_function(value)) is not None:
            return code
        return self._of_object(value)

    def _array(self, array: Any, dtype: Any, shape: Any) -> bytes:
        return _digest("array", f"{dtype}{tuple(shape)}".encode(), _bytes(array) if array.size else b"")

    def _of_class(self, value: type) -> bytes:
        """Hash the code of a class and those that it derives from; of installed ones the version of their package."""
        return self._once(value, self._look_into_class)

    def _once(self, value: Any, look: Callable[[Any], bytes]) -> bytes:
        """Look into code that may be used in many places, or by itself, once."""
        if id(value) not in self.code:
            self.code[id(value)] = value, b"above"
            self.code[id(value)] = value, look(value)
        return self.code[id(value)][1]

    def _look_into_class(self, value: type) -> bytes:
        parts: list[bytes] = []
        for cls in value.__mro__:
            parts.append(f"{cls.__module__}.{cls.__qualname__}".encode())
            if is_installed(cls):
                parts.append(version(cls.__module__))
                continue
            members = {name: function_of(member) for name, member in vars(cls).items()}
            for name, member in sorted(members.items(), key=lambda item: item[0]):
                if isinstance(member, types.FunctionType) or not (name.startswith("__") or is_of_python(member)):
                    parts += [name.encode(), self.hash(member)]
        return _digest("class", *parts)

    def _of_function(self, value: Any) -> bytes | None:
        if isinstance(value, functools.partial):
            return _digest("partial", self.hash(value.func), self.hash(value.args), self.hash(value.keywords))
        if isinstance(value, types.MethodType):
            owner = value.__self__
            used = used_attributes(owner, value.__func__) if isinstance(owner, LightningDataModule) else None
            return _digest("method", self.hash(value.__func__), self.hash(owner), self.hash(used))
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.MethodWrapperType):
            owner = getattr(value, "__self__", None)  # of a bound one, as in {"cat": 0}.get
            owner = getattr(value, "__objclass__", None) if isinstance(owner, types.ModuleType | None) else owner
            return _digest("builtin", value.__qualname__.encode(), self.hash(owner))
        if isinstance(value, types.FunctionType):
            return self._once(value, self._look_into_function)
        if callable(wrapped := getattr(value, "__wrapped__", None)):  # by functools.cache, say
            return _digest("wrapped", self.hash(wrapped))
        return None

    def _look_into_function(self, value: types.FunctionType) -> bytes:
        name = f"{value.__module__}.{value.__qualname__}".encode()
        if is_installed(value):
            return _digest("function", name, version(value.__module__))
        rest = (value.__defaults__, value.__kwdefaults__, list(map(_content, value.__closure__ or ())))
        return _digest("function", name, _code(value.__code__), self.hash(rest), self.hash(used_globals(value)))

    def _of_object(self, value: Any) -> bytes:
        kind = self._of_class(type(value))
        own = getattr(value, "identity", None)
        if callable(own) and not isinstance(value, nn.Module):
            return _digest("own", kind, str(own()).encode())
        if isinstance(value, Enum):
            return _digest("enum", kind, value.name.encode())
        if type(value).__module__.startswith("transformers.") and type(value).__name__ == "GenerationConfig":
            return _digest("generation", kind)  # no part of a loss, and it holds a hash() that no other process has
        if isinstance(value, logging.Logger | weakref.ReferenceType):
            return _digest("constant", kind)
        if isinstance(value, torch.fx.Graph):
            return _digest("graph", value.python_code("self").src.encode())
        if isinstance(value, LightningDataModule):  # holds its Trainer, too; see `used_attributes`
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
        folders = self.folders
        self.folders += tuple(str(item) for item in getattr(value, "__dict__", {}).values() if is_folder(item))
        try:
            content = self.hash(made if isinstance(made, str) else [*made[1:3], *map(list, filter(None, made[3:5]))])
        finally:
            self.folders = folders
        return _digest("object", kind, content)


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


def _bytes(array: Any) -> Any:
    try:
        return memoryview(array).cast("B")
    except (TypeError, ValueError):  # dates have no buffer
        return array.tobytes()


def _is_plain(value: Any, depth: int = 5) -> bool:
    if type(value) in (list, tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return type(value) in _PLAIN
