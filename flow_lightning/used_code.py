"""What code uses: its globals, the attributes of its object, the version of an installed package."""

import dis
import functools
import inspect
import os
import sys
import sysconfig
import types
from typing import Any

_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


def _names(code: types.CodeType, operations: tuple[str, ...]) -> set[str]:
    """Return the names that code loads by some operations, in its inner functions and comprehensions, too."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    own = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    return own.union(*(_names(constant, operations) for constant in inner))


def used_globals(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function uses of its module, and of other modules that are not installed."""
    used = dict[str, Any]()
    for name in sorted(_names(function.__code__, _GLOBALS) & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            used[name] = value
        elif not is_installed_module(value):
            attributes = _names(function.__code__, _ATTRIBUTES) & vars(value).keys()
            used |= {f"{name}.{attribute}": vars(value)[attribute] for attribute in sorted(attributes)}
    return {name: value for name, value in used.items() if not isinstance(value, types.ModuleType)}


def used_attributes(owner: Any, function: Any) -> dict[str, Any]:
    """Return the attributes of an object that one of its methods uses, and the methods that this one calls."""
    used, methods = dict[str, Any](), [inspect.unwrap(function)]
    for method in methods:
        for name in sorted(_names(method.__code__, _ATTRIBUTES)):
            called = inspect.unwrap(function_of(inspect.getattr_static(type(owner), name, None)))
            if name in vars(owner):
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
    return file is None or file.startswith(_INSTALLED)


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
