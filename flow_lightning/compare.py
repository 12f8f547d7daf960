"""Several methods side by side: one fit for each method, optimizer, rate and seed, then tables and pictures.

In: the words of a `compare` command. Out: a folder for each fit, `comparison.json`, `board.csv`, pictures, tables.
Next: `report/board.py`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from flow_lightning.cli import run
from flow_lightning.configurations import OptionError, Parser, find_part
from flow_lightning.files import write_bytes
from flow_lightning.report.board import report
from flow_lightning.report.metrics import Metrics, finite, read_metrics
from flow_lightning.run import run_directory

#: With fewer rates or seeds the best rate of a method, or the spread of its results, is a matter of luck.
_FAIR_RATES, _FAIR_SEEDS = 5, 3


class Fit(NamedTuple):
    """One fit of a board.

    Attributes:
        name: Of its column: the method, and what is varied beside it.
        folder: Where it writes; `finished.json` there holds its command, what its files say, and its numbers.
        words: Its command, in which names are files already.
        settings: Method, optimizer, rate, share of wrong labels, seed and folder, as the board has them.
    """

    name: str
    folder: Path
    words: list[str]
    settings: dict[str, Any]


def compare(words: Sequence[str]) -> None:
    """Make all fits of a board that are not finished yet, and report once all are.

    Args:
        words: The command line: `compare`, and its options.

    Raises:
        OptionError: If an option is wrong, or a process of `--jobs` failed.
        FloatingPointError: At the end, if a fit diverged.
    """
    options, shared = _options(words[1:])
    fits = list(_fits(options, shared))
    _check_folders(fits)
    for name in {name for fit in fits for name in _names(fit)}:
        _content(Path(name))  # what cannot be read is an error before any fit
    _warn_if_small(options)
    if options.jobs > 1:
        _share_out(words, options.jobs)
    else:
        number, parts = options.part
        for fit in fits[number::parts]:
            if _finished(fit) is None:
                _make(fit, options.output)
    found = [_finished(fit) for fit in fits]
    missing = [fit.folder for fit, metrics in zip(fits, found) if metrics is None]
    if missing:
        rank_zero_info(f"{len(missing)} of {len(fits)} fits are not finished, such as {missing[0]}: no report yet.")
        return
    _report(fits, [metrics or {} for metrics in found], options.output)
    if diverged := [f"{fit.folder}: {m['diverged']}" for fit, m in zip(fits, found) if m and "diverged" in m]:
        raise FloatingPointError("\n".join(["Runs that diverged, which the table leaves out:", *diverged]))


def board_parser() -> argparse.ArgumentParser:
    """Return the parser of a board's own options."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--board", type=Path)
    parser.add_argument("--methods", type=_listed, default=["standard", "flow"])
    parser.add_argument("--optimizers", type=_listed, default=[None])
    parser.add_argument("--rates", type=_listed, default=[None])
    parser.add_argument("--noise", type=_listed, default=[None])
    parser.add_argument("--seeds", type=_listed, default=[None])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=_part, default=(0, 1))
    return parser


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take the options of a board, from a YAML file if one is given, and leave those of the fits."""
    parser = board_parser()
    board, rest = parser.parse_known_args(words)
    known = {action.dest for action in parser._actions} - {"board"}
    for source, settings in _settings(board.board, rest):
        if unknown := set(settings) - known:
            raise OptionError(f"{source} has {sorted(unknown)}, but a board has {', '.join(sorted(known))}.")
        parser.set_defaults(**{name: str(value) for name, value in settings.items()})
    board, rest = parser.parse_known_args(words)
    shares = [share for share in board.noise if share is not None]
    if wrong := [share for share in shares if not isinstance(share, int | float) or not 0 <= share < 1]:
        raise OptionError(f"--noise has {wrong[0]!r}; expected shares of wrong labels from 0 to below 1: [0, 0.3].")
    if board.rates != [None]:
        board.rates = [_rate(given) for given in board.rates]
    if board.rates != [None] and len(set(board.rates)) < 2:
        raise OptionError(f"--rates is {board.rates}: a board needs at least two, such as [0.001, 0.002, 0.004].")
    return board, rest


def _settings(file: Path | None, words: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the settings of boards: the part `board` of each configuration, then the file of a board."""
    for word in words:
        path = Path(word.removeprefix("--config="))
        if word.startswith("--config=") and "{" not in word and path.is_file():
            yield path, _content(path).get("board") or {}
    if file is not None:
        yield file, _content(file)


def _content(file: Path) -> dict[str, Any]:
    """Read a YAML file of options."""
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{file} holds a {type(content).__name__}; expected options, such as learning_rate: 0.001.")
    return content


def _listed(text: str) -> list[Any]:
    """Read a list such as "[1, 2, 3]"; one value counts as a list of it."""
    value = yaml.safe_load(text)
    return value if isinstance(value, list) else [value]


def _rate(given: Any) -> float:
    """Return a learning rate as a number: YAML reads 1e-4, without a dot, as a text."""
    try:
        rate = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise OptionError(f"--rates has {given!r}; expected learning rates above 0, such as [0.001, 0.002, 0.004].")
    return rate


def _check_folders(fits: Sequence[Fit]) -> None:
    """Refuse two fits of different commands in one folder, each of which would be made again for the other."""
    commands: dict[Path, list[str]] = {}
    for fit in fits:
        if commands.setdefault(fit.folder, fit.words) != fit.words:
            raise OptionError(
                f"Two fits would write to {fit.folder}. Give their files different names, and rates that differ in "
                "their first six digits."
            )


def _warn_if_small(options: argparse.Namespace) -> None:
    """Say what a board of rates lacks for a fair comparison, in the first of its parts or processes alone."""
    rates, seeds = len(set(options.rates)), len(set(options.seeds))
    is_first = (options.jobs, options.part[0]) == (1, 0)
    if options.rates != [None] and is_first and (rates < _FAIR_RATES or seeds < _FAIR_SEEDS):
        rank_zero_warn(
            f"This board has {rates} rates and {seeds} seeds. To compare methods fairly give at least {_FAIR_RATES} "
            f"rates, each about twice the one before, and {_FAIR_SEEDS} seeds: intervals over fewer seeds mean little."
        )


def _part(text: str) -> tuple[int, int]:
    """Read "2/4", the third of four parts."""
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise OptionError(f"--part is {text!r}; expected 0/4, 1/4, 2/4 or 3/4 for one of four parts.")
    return int(number), int(parts)


def _fits(options: argparse.Namespace, shared: Sequence[str]) -> Iterator[Fit]:
    """Yield all fits, seed by seed, so that a board that is not finished compares like with like."""
    factors = (options.seeds, options.noise, options.methods, options.optimizers, options.rates)
    for seed, noise, method, optimizer, rate in product(*factors):
        varied = {"method": Path(method).stem, "optimizer": optimizer and Path(optimizer).stem, "rate": rate}
        name = " ".join(f"{value:g}" if isinstance(value, int | float) else value for value in varied.values() if value)
        name += "" if noise is None else f" noise {noise:g}"
        folder = options.output / name.replace(" ", "-") / ("default" if seed is None else f"seed-{seed}")
        words = ["fit", *shared, f"--config={find_part('method', method)}"]
        words += [f"--config={find_part('optimizer', optimizer)}"] if optimizer else []
        words += [f"--trainer.default_root_dir={folder}"]
        options_of_fit = {"learning_rate": rate, "data.label_noise.rate": noise, "seed_everything": seed}
        words += [f"--{option}={value}" for option, value in options_of_fit.items() if value is not None]
        yield Fit(name, folder, words, varied | {"noise": noise, "seed": seed or 0, "folder": str(folder)})


def _make(fit: Fit, board: Path) -> None:
    """Make a fit, and write down that it is finished, with its numbers, or that it diverged."""
    words = [fit.words[0], f"--retention.frozen_folder={board / 'frozen'}", *fit.words[1:]]  # changes no number
    files = _files(fit)  # as they are when the fit begins
    try:
        directory = run_directory(run(words).trainer)
        metrics = read_metrics(directory / "metrics.json") if directory else {}
    except FloatingPointError as error:  # the other fits are worth having
        metrics = {"diverged": str(error)}
    _write(fit.folder / "finished.json", {"words": fit.words, "files": files, "metrics": metrics})


def _names(fit: Fit) -> list[str]:
    """Return the names of a fit's configuration files."""
    return [word.removeprefix("--config=") for word in fit.words if word.startswith("--config=") and "{" not in word]


def _files(fit: Fit) -> dict[str, Any]:
    """Return what the configurations of a fit say of it, by file."""
    loaded = {name: _content(Path(name)) for name in _names(fit)}
    for content in loaded.values():
        content.pop("board", None)
    return json.loads(json.dumps(finite(loaded), default=str))  # type: ignore[no-any-return]


def _finished(fit: Fit) -> Metrics | None:
    """Return the numbers of a finished fit of the same command and files; None if there is none.

    Boards of earlier versions did not note what their files said.
    """
    file = fit.folder / "finished.json"
    if not file.exists():
        return None
    content = read_metrics(file)
    files = _files(fit)
    return content["metrics"] if (content["words"], content.get("files", files)) == (fit.words, files) else None


def _share_out(words: Sequence[str], jobs: int) -> None:
    """Run parts of the board in processes of their own, each with a device of its own where there are several."""
    devices = torch.cuda.device_count()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "flow_lightning", *words, "--jobs=1", f"--part={number}/{jobs}"],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": str(number % devices)} if devices else {}),
        )
        for number in range(jobs)
    ]
    codes = [process.wait() for process in processes]  # all of them, also after one has failed
    if any(codes):
        raise OptionError("A process of the board failed; see its message above. The same command goes on from there.")


@rank_zero_only  # under ddp every process goes through all runs
def _write(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(finite(content), indent=2, sort_keys=True) + "\n").encode())


@rank_zero_only
def _report(fits: Sequence[Fit], found: Sequence[Metrics], folder: Path) -> None:
    """Write down, print and draw what the fits measured."""
    runs: dict[str, list[Metrics]] = {fit.name: [] for fit in fits}
    for fit, metrics in zip(fits, found):
        runs[fit.name].append({} if "diverged" in metrics else metrics)
    _write(folder / "comparison.json", runs)
    report(runs, [fit.settings for fit in fits], found, folder)
