"""The shipped configurations, found by name from a checkout and from an installed package.

In: the words of a command line. Out: the same words, with files in place of names.
Next: `cli.py`, which gives them to the parser.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parent
#: A wheel carries the folder inside the package; a checkout has it beside the package.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


class OptionError(ValueError):
    """An option that the command line cannot take; its message is all that the user needs."""


def shipped() -> dict[str, Path]:
    """Return the shipped configurations by name: the path below `configs/` without `.yaml`.

    Example:
        >>> shipped()["methods/flow"].name
        'flow.yaml'
    """
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def method_names() -> list[str]:
    """Return the names of the shipped methods."""
    return [name.removeprefix("methods/") for name in shipped() if name.startswith("methods/")]


def find_configuration(name: str) -> Path:
    """Return the file of a configuration. A file that exists comes first.

    Args:
        name: A file, or a shipped name; the folder of the name may be left out: "cifar10" for "vision/cifar10".

    Raises:
        OptionError: If there is no such file and no such name; the message gives the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped()
    short = {key.rpartition("/")[2]: path for key, path in reversed(known.items())}
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    path = known.get(wanted) or short.get(wanted)
    if path is None:
        raise OptionError(
            f"No configuration {name!r}: it is no file and no shipped name. {nearest(wanted, [*short, *known])}"
            "All names: flow-lightning --help"
        )
    return path


def find_method(name: str) -> Path:
    """Return the file of a method.

    Args:
        name: The name of a shipped method, or a file of your own.

    Raises:
        OptionError: If there is no such method and no such file; the message gives the nearest name.
    """
    short = Path(name).stem
    if short in method_names() and not Path(name).is_file():
        return shipped()[f"methods/{short}"]
    if Path(name).is_file():
        return Path(name)
    raise OptionError(f"No method {name!r}. {nearest(name, method_names())}Shipped: {', '.join(method_names())}.")


def with_files(arguments: Sequence[str]) -> list[str]:
    """Replace the names of configurations by files, and `--method NAME` by the method's file.

    The method's file comes where `--method` stands, but after the first configuration, which would undo it.

    Example:
        >>> [Path(word).name for word in with_files(["fit", "--method", "flow", "-c", "cifar10"])]
        ['fit', '--config=cifar10.yaml', '--config=flow.yaml']

    Raises:
        OptionError: If a name is unknown, or there are two methods.
    """
    words = _options_with_values(arguments)
    out: list[str] = []
    waiting: list[str] = []
    anything = any(option in _CONFIG for option, _ in words)
    for option, value in words:
        if option in _CONFIG:
            # jsonargparse also takes a configuration itself in place of a file.
            out += [f"--config={value if '{' in value else find_configuration(value)}", *waiting]
            waiting, anything = [], False
        elif option == "--method":
            (waiting if anything else out).append(f"--config={find_method(value)}")
        else:
            out.append(value)
    if len(methods := methods_among(out)) > 1:
        raise OptionError(f"There are {len(methods)} methods, {' and '.join(methods)}. Give one.")
    return out


def methods_among(arguments: Sequence[str]) -> list[str]:
    """Return the names of the shipped methods whose files are among the arguments."""
    paths = [Path(word.removeprefix("--config=")) for word in arguments if word.startswith("--config=")]
    return [path.stem for path in paths if path.resolve().parent == (FOLDER / "methods").resolve()]


_CONFIG = ("-c", "--config")


def _options_with_values(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Pair the options for configurations and methods with their values; other words come as `("", word)`."""
    words: list[tuple[str, str]] = []
    rest = iter(arguments)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in (*_CONFIG, "--method"):
            words.append(("", word))
        elif equals or ((value := next(rest, "")) and not value.startswith("-")):
            words.append((option, value))
        else:
            raise OptionError(
                f"{option} needs a value, such as {option} {'flow' if option == '--method' else 'cifar10'}."
            )
    return words


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "Did you mean ...? " with the name that is most alike, or nothing if none is.

    Example:
        >>> nearest("cifar", ["cifar10", "dtd"])
        'Did you mean cifar10? '
    """
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"Did you mean {matches[0]}? " if matches else ""
