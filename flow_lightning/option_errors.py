"""What is wrong with an option, in one or two lines, the nearest right name first.

In: the parser's message, tens of lines long. Out: ours. Next: `cli.py`.
"""

import re
from collections.abc import Iterable
from inspect import signature
from pydoc import locate
from typing import Any

from lightning import Callback

from flow_lightning.configurations import nearest

_UNKNOWN = re.compile(r"does not accept option '([^']+)'|unrecognized arguments: -*(\S+)|Key '([^']+)' is not expected")
_UNKNOWN_OF_CLASS = re.compile(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_KEY = re.compile(r'Parser key "([\w.]+)":')
_WRONG_VALUE = re.compile(  # of one type, or of several
    r"Expected (?:an? )?(?P<type>[^\n]+)\. Got value: (?P<got>.+)|"
    r"Subtypes: \[(?P<types>.+)\]\n\s*Errors:\n(?:\s*- Expected .+\n)+\s*Given value type: .+\n"
    r"\s*Given value: (?P<given>.+)"
)
_NESTED = re.compile(
    r"Errors:\n\s*- (?:Problem with given class_path '[\w.]+':\s+)?(?!Expected|Not a valid|Problem|Parser)"
    r"(.+?)(?=\n\s*- |\n\s*Given value|\Z)",
    re.DOTALL,
)


def explain(message: str, keys: Iterable[str]) -> str:
    """Shorten a message of jsonargparse; `keys` are all options that the parser knows."""
    if match := _UNKNOWN_OF_CLASS.search(message):
        path, option = match.groups()
        owner: Any = locate(path)
        known = list(signature(owner).parameters)
        found = f"{path} has no option {option!r}. {nearest(option, known)}It has: {', '.join(known)}."
        is_callback = isinstance(owner, type) and issubclass(owner, Callback)
        return found + " --trainer.callbacks.* is for the callback that was added last." * is_callback
    if match := _UNKNOWN_CLASS.search(message):
        module, name = match.groups()
        return f"{module} has no {name!r}. {nearest(name, dir(locate(module)))}".strip()
    if match := _UNKNOWN.search(message):
        name = match[match.lastindex or 0].partition("=")[0]
        return f"There is no option {name!r}. {nearest(name, keys)}All options: flow-lightning fit --help-all."
    if match := _WRONG_VALUE.search(message):
        key = ".".join(dict.fromkeys(_KEY.findall(message)))
        return _wrong_value(key, match["type"] or match["types"], match["got"] or match["given"])
    if match := _NESTED.search(message):
        return " ".join(match[1].split())
    return message.rpartition(" failed: ")[2].strip()


def _wrong_value(key: str, types: str, value: str) -> str:
    """Say which value was expected; for a choice of words the nearest comes first."""
    types = re.sub(r"<class '([\w.]+)'>", r"\1", types.replace("typing.", "")).replace("NoneType", "null")
    words = re.findall(r"'([^']+)'", types) if "Literal" in types else []
    expected = f"one of {', '.join(words)}" if words else re.sub(r", (?![^\[]*\])", " or ", types)
    return f"{key}: {value!r} is no valid value. {nearest(value, words)}Expected {expected}."
