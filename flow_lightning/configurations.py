"""The shipped configurations, found by name from a checkout and from an installed package.

In: the words of a command line. Out: the same words, with files in place of names.
Next: `cli.py`, which gives them to the parser.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import yaml

_PACKAGE = Path(__file__).parent
#: A wheel carries the folder inside the package; a checkout has it beside the package.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


class OptionError(argparse.ArgumentTypeError):
    """An option that the command line cannot take; its message is all that the user needs."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `OptionError`."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and how the command is used if that is known."""
        raise OptionError(f"{message}. Expected: {self.usage}" if self.usage else message)


def shipped() -> dict[str, Path]:
    """Return the shipped configurations by name: the path below `configs/` without `.yaml`."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def names_of(kind: str) -> list[str]:
    """Return the names of the shipped `methods` or `optimizers`."""
    return [name.removeprefix(f"{kind}/") for name in shipped() if name.startswith(f"{kind}/")]


def find_configuration(name: str) -> Path:
    """Return the file of a configuration: a file of your own, or a shipped one, "cifar10" for "vision/cifar10"."""
    if Path(name).is_file():
        return Path(name)
    known = shipped()
    known = {key.rpartition("/")[2]: path for key, path in reversed(known.items())} | known
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if wanted not in known:
        hint = nearest(wanted, known)
        raise OptionError(f"{name!r} is no file and no shipped name. {hint}All names: flow-lightning --help")
    return known[wanted]


def callbacks_of(method: str) -> set[str]:
    """Return the names of the callback classes of a shipped method; none of a method of your own.

    >>> callbacks_of("flow")
    {'FlowWeightingCallback'}
    """
    file = FOLDER / "methods" / f"{method}.yaml"
    trainer = yaml.safe_load(file.read_text()).get("trainer", {}) if file.is_file() else {}
    return {callback["class_path"].rpartition(".")[2] for callback in trainer.get("callbacks+", [])}


def find_part(kind: Literal["method", "optimizer"], name: str) -> Path:
    """Return the file of a method or an optimizer: a file of your own, or a shipped one."""
    file = Path(name) if Path(name).is_file() else FOLDER / f"{kind}s" / f"{name}.yaml"
    if not file.is_file():
        names = names_of(f"{kind}s")
        raise OptionError(f"No {kind} {name!r}. {nearest(name, names)}Shipped: {', '.join(names)}.")
    return file


def with_files(arguments: Sequence[str]) -> list[str]:
    """Replace the names of configurations and methods by files, which come before all other options.

    A method's file keeps its place among them, but comes after the first configuration, which would undo it.

    Example:
        >>> [Path(word).name for word in with_files(["fit", "--method", "flow", "-c", "cifar10"])]
        ['fit', 'cifar10.yaml', 'flow.yaml']
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", dest="files", default=[], type=_file_or_yaml)
    parser.add_argument("--method", action="append", dest="files", type=lambda name: (True, find_part("method", name)))
    parsed, words = parser.parse_known_args(arguments)
    files: list[tuple[bool, Path | str]] = parsed.files
    if sum(is_method for is_method, _ in files) > 1:
        raise OptionError("There are two methods. Give one --method.")
    if files and files[0][0]:
        files[:2] = files[1::-1]
    return [*words[:1], *(f"--config={file}" for _, file in files), *words[1:]]


def _file_or_yaml(value: str) -> tuple[bool, Path | str]:
    return False, value if "{" in value else find_configuration(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "Did you mean ...? " with the name that is most alike, or nothing if none is."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"Did you mean {matches[0]}? " if matches else ""
