"""The packages of the extra `language`: imported only where they are used, with the fix if one is missing."""

import importlib
from typing import Any


def import_language(name: str) -> Any:
    """Import a module of the extra `language`.

    Args:
        name: Name of the module, "datasets" or "pyarrow.parquet", say.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Language models need the package {name.partition('.')[0]!r}, which could not be imported ({error}). "
            'Install it: pip install "flow-lightning[language]"'
        ) from error
