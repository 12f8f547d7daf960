"""Wrong arguments: each is refused by its name and value."""

import re
from typing import Any

import pytest


def assert_refused(kind: type, settings: dict[str, Any]) -> None:
    """Make an object with settings of which the last one is wrong."""
    *_, (name, value) = settings.items()
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}"):
        kind(**settings)
