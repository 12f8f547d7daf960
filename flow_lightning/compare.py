"""Several methods side by side: one fit for each method and seed, then table, picture and one JSON file.

In: the words of a `compare` command. Out: `comparison.json`, `comparison.png`, a table.
Next: `report/metrics.py`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from flow_lightning.cli import run
from flow_lightning.configurations import find_method
from flow_lightning.files import write_bytes
from flow_lightning.report.metrics import metrics_table, print_table, read_metrics
from flow_lightning.report.pictures import plot_comparison
from flow_lightning.run import run_directory


def compare(words: Sequence[str]) -> None:
    """Fit one configuration by several methods and seeds; FloatingPointError, at the end, if a run diverged."""
    parser = argparse.ArgumentParser("flow-lightning compare", allow_abbrev=False, add_help=False)
    parser.add_argument("--methods", type=_listed, default=["standard", "flow"])
    parser.add_argument("--seeds", type=_listed, default=[None])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    options, shared = parser.parse_known_args(words[1:])
    files = {Path(method).stem: find_method(method) for method in options.methods}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    diverged: list[str] = []
    for seed in options.seeds:
        for name, file in files.items():
            folder = options.output / name / ("default" if seed is None else f"seed-{seed}")
            own = [f"--config={file}", f"--trainer.default_root_dir={folder}"]
            own += [] if seed is None else [f"--seed_everything={seed}"]
            try:
                directory = run_directory(run(["fit", *shared, *own]).trainer)
                runs[name].append(read_metrics(directory / "metrics.json") if directory else {})
            except FloatingPointError as error:  # the other runs are worth having
                diverged.append(f"{folder}: {error}")
                runs[name].append({})
    _report(runs, options.output)
    if diverged:
        raise FloatingPointError("\n".join(["Runs that diverged, which the table leaves out:", *diverged]))


def _listed(text: str) -> list[Any]:
    """Read a list such as "[1, 2, 3]"; one value counts as a list of it."""
    value = yaml.safe_load(text)
    return value if isinstance(value, list) else [value]


@rank_zero_only  # under ddp every process goes through all runs
def _report(runs: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Print and draw what the runs of each method measured, and write it down."""
    write_bytes(folder / "comparison.json", (json.dumps(runs, indent=2, sort_keys=True) + "\n").encode())
    plot_comparison(runs, folder / "comparison.png")
    count = max(len(column) for column in runs.values())
    spread = f", mean ± standard deviation of {count} seeds" if count > 1 else ""
    table = metrics_table(runs, f"What each method learned and what it kept{spread}")
    print_table(table, f"Runs, comparison.json and comparison.png: {folder.absolute()}")
