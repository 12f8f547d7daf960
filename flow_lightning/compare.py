"""Several methods side by side: one fit for each method and seed, then table, picture and one JSON file.

In: the words after `compare`, and the function that runs a fit. Out: `comparison.json`, `comparison.png`, a table.
Next: `report/metrics.py`.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from flow_lightning.configurations import OptionError, find_method, methods_among
from flow_lightning.files import write_bytes
from flow_lightning.report.metrics import metrics_table, read_metrics
from flow_lightning.report.pictures import plot_comparison
from flow_lightning.run import run_directory


def compare(arguments: Sequence[str], fit: Callable[[list[str]], Trainer]) -> None:
    """Fit one configuration by several methods and seeds, one after the other, and report them side by side.

    Args:
        arguments: Options of `fit`, and `--methods`, `--seeds` and `--output`.
        fit: Runs one fit from its arguments and returns its trainer.

    Raises:
        OptionError: If a method is unknown, or given outside `--methods`.
        FloatingPointError: At the end, if a run diverged; the table leaves it out.
    """
    options, shared = _options(arguments)
    if methods_among(shared):
        raise OptionError('compare takes its methods from --methods, such as --methods "[standard, flow]".')
    files = {Path(method).stem: find_method(method) for method in options.methods}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    diverged: list[str] = []
    for seed in options.seeds or [None]:
        for name, file in files.items():
            folder = Path(options.output) / name / ("default" if seed is None else f"seed-{seed}")
            words = [f"--config={file}", f"--trainer.default_root_dir={folder}"]
            words += [] if seed is None else [f"--seed_everything={seed}"]
            try:
                runs[name].append(_metrics(fit([*shared, *words])))
            except FloatingPointError as error:  # the other runs are worth having
                diverged.append(f"{folder}: {error}")
                runs[name].append({})
    if getattr(rank_zero_only, "rank", 0) == 0:  # under ddp every process goes through all runs
        report_comparison(runs, Path(options.output))
    if diverged:
        raise FloatingPointError("\n".join(["Runs that diverged, which the table leaves out:", *diverged]))


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the options of `compare` from those of `fit`."""
    parser = argparse.ArgumentParser("flow-lightning compare", allow_abbrev=False, add_help=False)
    parser.add_argument("--methods", type=_listed, default=["standard", "flow"])
    parser.add_argument("--seeds", type=_listed)
    parser.add_argument("--output", default="runs/compare")
    return parser.parse_known_args(arguments)


def _listed(text: str) -> list[Any]:
    """Read a list such as "[1, 2, 3]"; one value counts as a list of it."""
    value = yaml.safe_load(text)
    return value if isinstance(value, list) else [value]


def _metrics(trainer: Trainer) -> dict[str, Any]:
    """Read what a run measured; a run need not measure anything."""
    file = (run_directory(trainer) or Path()) / "metrics.json"
    return read_metrics(file) if file.exists() else {}


def report_comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Print the table, mean and standard deviation over the runs of each method, and write it down.

    Args:
        runs: Name of the method to the metrics of its runs, one for each seed.
        folder: Gets `comparison.json` and `comparison.png`.
    """
    write_bytes(folder / "comparison.json", (json.dumps(runs, indent=2, sort_keys=True) + "\n").encode())
    plot_comparison(runs, folder / "comparison.png")
    count = max(len(column) for column in runs.values())
    spread = f", mean ± standard deviation of {count} seeds" if count > 1 else ""
    Console().print(metrics_table(runs, f"What each method learned and what it kept{spread}"))
    Console().print(f"Runs, comparison.json and comparison.png: {folder.absolute()}", soft_wrap=True)
