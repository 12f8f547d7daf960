"""What files a value names, and whether they are still the same."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def file_states(value: Any, folders: Sequence[str]) -> list[bytes]:
    """Return size and time of change of all files that are named in a plain value, by themselves or in a folder."""
    if isinstance(value, list | tuple):
        return [state for item in value for state in file_states(item, folders)]
    if not isinstance(value, str) or not ("." in value or os.sep in value) or len(value) > 4096 or "\n" in value:
        return []
    for folder in folders:
        try:
            found = os.stat(os.path.join(folder, value))
        except (OSError, ValueError):  # no such file, or no name of a file
            continue
        return [f"{found.st_size} {found.st_mtime_ns}".encode()] if stat.S_ISREG(found.st_mode) else []
    return []


def is_folder(value: Any) -> bool:
    """Tell whether a value names a folder."""
    return isinstance(value, str | Path) and 0 < len(str(value)) <= 4096 and os.path.isdir(value)


def distance(array: Any) -> int:
    """Return how many bytes a part of a memory-mapped array starts behind the whole of it."""
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return int(array.ctypes.data - whole.ctypes.data)
