"""Several methods side by side: table, picture and one JSON file with every run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flow_lightning.files import write_bytes
from flow_lightning.report.metrics import metrics_table
from flow_lightning.report.pictures import plot_comparison


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
