"""Packages of the extras: imported only where they are used, with the line that installs a missing one.

In: the name of a module and its extra. Out: the module, or the folder of its package. Next: the file that asked.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def optional_import(module: str, extra: str, purpose: str) -> Any:
    """Import a module such as "pyarrow.parquet"; the error says for what `purpose` and how to install its `extra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"The package {package!r} is needed for {purpose} and cannot be imported ({error}). "
            f'Run pip install "flow-lightning[{extra}]"',
            name=package,
        ) from error


def package_folder(package: str, extra: str, purpose: str) -> Path:
    """Return the folder of a package without importing it; otherwise as `optional_import`."""
    spec: Any = find_spec(package) or optional_import(package, extra, purpose).__spec__  # fails, with the pip line
    return Path(spec.submodule_search_locations[0])
