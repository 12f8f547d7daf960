"""The page of a board: methods side by side, and the plane of learned and kept.

In: a folder of `compare`, finished or not. Out: sections. Next: `render.py`.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_lightning.report.metrics import Metrics, format_value, main_panel, metric_rows, read_metrics
from flow_lightning.report.page import charts
from flow_lightning.report.page.run_page import Section, Table

Runs = Mapping[str, Sequence[Metrics]]


def is_board(folder: Path) -> bool:
    """Tell whether a folder is one of `compare`."""
    return (folder / "comparison.json").exists() or any(folder.glob("*/*/finished.json"))


def board_sections(folder: Path) -> tuple[list[Section], list[str]]:
    """Return the sections of a board, and what is missing."""
    missing, found = [], folder / "comparison.json"
    runs: Runs = read_metrics(found) if found.exists() else {}
    if not found.exists():
        runs = _finished(folder)
        missing.append("comparison.json: the board is not finished. The same command makes the fits that are missing.")
    return list(_sections(folder, runs)), missing


def _finished(folder: Path) -> Runs:
    runs: dict[str, list[Metrics]] = {}
    for file in sorted(folder.glob("*/*/finished.json")):
        metrics = read_metrics(file)["metrics"]
        runs.setdefault(file.parents[1].name, []).append({} if "diverged" in metrics else metrics)
    return runs


def _sections(folder: Path, runs: Runs) -> Iterator[Section]:
    count = sum(map(len, runs.values()))
    text = [
        f"{count} {'run' if count == 1 else 'runs'} of {len(runs)} {'method' if len(runs) == 1 else 'methods'}: {', '.join(runs)}."
    ]
    if diverged := sum(not run for column in runs.values() for run in column):
        text.append(f"{diverged} diverged, and {'is' if diverged == 1 else 'are'} left out.")
    yield Section("In short", text)
    yield _frontier(folder, runs)
    every = [run for column in runs.values() for run in column]
    rows = []
    for metric in metric_rows({key for run in every for key in run}):
        values = [[run[metric.key] for run in column if run.get(metric.key) is not None] for column in runs.values()]
        if any(values):
            rows.append([metric.name, *(format_value(metric, column) for column in values)])
    yield Section("All numbers", tables=[Table("Mean ± standard deviation of the runs", ["", *runs], rows)])


def _frontier(folder: Path, runs: Runs) -> Section:
    section, file = Section("Frontier: learned against kept"), folder / "board.csv"
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            groups = _points(list(csv.DictReader(lines)))
        labels = ("kept (% of before)", "target accuracy (%)")
    else:
        every = [run for column in runs.values() for run in column]
        learned, kept = (main_panel(part, every) for part in ("target", "retention"))
        if learned is None or kept is None:
            section.text = ["No run measured both what it learned and what it kept: there is nothing to draw."]
            return section
        x, y = (100 if panel.is_percent else 1 for panel in (kept, learned))
        groups = {
            name: [
                (
                    x * run[kept.main],
                    y * run[learned.main],
                    f"{name}, run {number}: {learned.title} {y * run[learned.main]:.4g}, {kept.title} {x * run[kept.main]:.4g}",
                )
                for number, run in enumerate(column, 1)
                if run.get(kept.main) is not None and run.get(learned.main) is not None
            ]
            for name, column in runs.items()
        }
        labels = (f"kept: {kept.title}", f"learned: {learned.title}")
    section.charts = [("Each mark is a model; up and right is better", charts.plane(groups, *labels).markup)]
    return section


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        name = " ".join(part for part in (row["method"], row["optimizer"]) if part)
        kept, learned = 100 * float(row["retention"]), 100 * float(row["target"])
        settings = f"rate {row['rate'] or 'default'}, seed {row['seed']}, alpha {row['alpha']}"
        groups.setdefault(name, []).append(
            (kept, learned, f"{name}, {settings}: target {learned:.1f} %, kept {kept:.1f} %")
        )
    return groups


def configuration(folder: Path) -> str:
    """Return the commands of the finished fits, one a line."""
    words = [json.loads(file.read_text(encoding="utf-8"))["words"] for file in sorted(folder.glob("*/*/finished.json"))]
    return "\n".join(f"flow-lightning {' '.join(each)}" for each in words)
