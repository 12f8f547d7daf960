"""What code uses: its globals, the attributes of its object, the version of an installed package."""

import dis
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_PACKAGES = frozenset({"site-packages", "dist-packages"})
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")


def _names(code: types.CodeType, operations: tuple[str, ...]) -> set[str]:
    """Return the names that code loads by some operations, in its inner functions and comprehensions, too."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    own = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    return own.union(*(_names(constant, operations) for constant in inner))


def used_globals(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function uses of its module and of others that are not installed, imported there or by itself."""
    code, space = function.__code__, function.__globals__
    names = {name: space[name] for name in sorted(_names(code, _GLOBALS) & space.keys())}
    modules = {name: value for name, value in names.items() if isinstance(value, types.ModuleType)}
    modules |= {module.__name__: module for module in _imported(code, str(space.get("__package__") or ""))}
    used = {name: value for name, value in names.items() if name not in modules}
    attributes = _names(code, _ATTRIBUTES)
    for name, module in modules.items():
        used |= _of_module(name, module, attributes)
    return used


def _of_module(name: str, module: types.ModuleType, attributes: set[str], depth: int = 4) -> dict[str, Any]:
    """Return attributes of a module, and of those in it, that are not installed."""
    used = dict[str, Any]()
    if depth == 0 or is_installed_module(module):
        return used
    for attribute in sorted(attributes & vars(module).keys()):
        value = vars(module)[attribute]
        if isinstance(value, types.ModuleType):
            used |= _of_module(f"{name}.{attribute}", value, attributes, depth - 1)
        else:
            used[f"{name}.{attribute}"] = value
    return used


def _imported(code: types.CodeType, package: str) -> list[types.ModuleType]:
    """Return the modules that code imports by itself, those that are installed left out."""
    found, before = list[types.ModuleType](), [0, 0]
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            module = _module_named("." * int(before[0] or 0) + step.argval, package)
            found += [module] if module is not None else []
        before = [before[1], step.argval]  # the level of a relative import, then the names imported
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return found + [module for constant in inner for module in _imported(constant, package)]


def _module_named(name: str, package: str) -> types.ModuleType | None:
    try:
        spec = importlib.util.find_spec(name, package or None)
        if spec is None or spec.origin is None or _is_installed_file(spec.origin):
            return None
        return importlib.import_module(name, package or None)
    except Exception:  # the code will fail to import it, too
        return None


def used_attributes(owner: Any, function: Any) -> dict[str, Any]:
    """Return the attributes of an object that one of its methods uses, and the methods that this one calls."""
    used, methods = dict[str, Any](), [inspect.unwrap(function)]
    for method in methods:
        for name in sorted(_names(method.__code__, _ATTRIBUTES)):
            called = inspect.unwrap(function_of(inspect.getattr_static(type(owner), name, None)))
            if name == "hparams" and isinstance(owner, HyperparametersMixin):
                used[name] = dict(owner.hparams)
            elif name in vars(owner):
                used[name] = vars(owner)[name]
            elif isinstance(called, types.FunctionType) and not is_installed(called) and called not in methods:
                methods.append(called)
    return used


def function_of(member: Any) -> Any:
    """Return the function in a method or property of a class."""
    for name in ("__func__", "fget", "func"):
        if isinstance(function := getattr(member, name, None), types.FunctionType):
            return function
    return member


def is_of_python(member: Any) -> bool:
    """Tell whether a member of a class is there for Python's own sake: a slot, the register of an abstract class."""
    return (
        isinstance(member, types.MemberDescriptorType | types.GetSetDescriptorType) or type(member).__module__ == "_abc"
    )


def is_installed(value: Any) -> bool:
    """Tell whether a function or class comes with Python or an installed package, which has a version."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    return module is not None and is_installed_module(module)


def is_installed_module(module: types.ModuleType) -> bool:
    """Tell whether a module comes with Python or an installed package."""
    if module.__name__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    return file is None or _is_installed_file(file)


def _is_installed_file(file: str) -> bool:
    """Tell whether a file is in a folder of packages, of this interpreter or of another that it borrows from."""
    return file in ("built-in", "frozen") or file.startswith(_INSTALLED) or not _PACKAGES.isdisjoint(Path(file).parts)


@functools.cache
def version(module: str | None) -> bytes:
    """Return the version of an installed module's package; of one without a version, size and time of the file."""
    name = (module or "").partition(".")[0]
    package = sys.modules.get(name)
    number, file = getattr(package, "__version__", None), getattr(sys.modules.get(module or ""), "__file__", None)
    if number is not None or name in sys.stdlib_module_names or file is None:
        return str(number or sys.version).encode()
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}".encode()
