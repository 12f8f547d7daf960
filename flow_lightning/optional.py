"""Packages of the extras: imported only where they are used, with the line that installs a missing one.

In: the name of a module and its extra. Out: the module, or the folder of its package. Next: the file that asked.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def optional_import(module: str, extra: str, purpose: str = "") -> Any:
    """Import a module that an extra installs.

    Args:
        module: Name of the module, such as "datasets" or "pyarrow.parquet".
        extra: The extra of flow-lightning that installs it.
        purpose: What it is needed for, as the message says it: "tasks of the evaluation harness".

    Raises:
        ImportError: If it cannot be imported. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, extra, purpose, str(error)) from error


def package_folder(package: str, extra: str, purpose: str = "") -> Path:
    """Return the folder of a package without importing it; otherwise as `optional_import`."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, extra, purpose, "it is not installed")
    return Path(spec.submodule_search_locations[0])


def _missing(module: str, extra: str, purpose: str, reason: str) -> ImportError:
    package = module.partition(".")[0]
    needed = f"is needed for {purpose}" if purpose else "is needed"
    return ImportError(
        f"The package {package!r} {needed} and cannot be imported ({reason}). "
        f'Run pip install "flow-lightning[{extra}]"',
        name=package,
    )
