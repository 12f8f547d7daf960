"""The page of a board: methods side by side, and the plane of learned and kept.

In: a folder of `compare`, finished or not. Out: sections. Next: `render.py`.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_lightning.report.metrics import Metrics, filled_rows, main_panel, read_metrics
from flow_lightning.report.page import charts
from flow_lightning.report.page.section import Section, Table

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
    every = [run for column in runs.values() for run in column]
    text = [f"{_count(every, 'run')} of {_count(list(runs), 'method')}: {', '.join(runs)}."]
    if diverged := sum(not run for run in every):
        text.append(f"{diverged} of them diverged, without numbers.")
    yield Section("In short", text)
    yield _frontier(folder, runs, every)
    rows = [[metric.name, *cells] for metric, cells in filled_rows(list(runs.values()))]
    yield Section("All numbers", tables=[Table("Mean ± standard deviation of the runs", ["", *runs], rows)])


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _frontier(folder: Path, runs: Runs, every: Sequence[Metrics]) -> Section:
    section, file = Section("Frontier: learned against kept"), folder / "board.csv"
    labels, groups = ("kept (% of before)", "target accuracy (%)"), dict[str, list[tuple[float, float, str]]]()
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                labels = labels[0], f"target {row.get('target_of') or 'accuracy'} (%)"
                name = " ".join(part for part in (row["method"], row["optimizer"]) if part)
                name += f", {100 * float(row['noise']):g} % wrong" if row.get("noise") else ""
                settings = f"{name}, rate {row['rate'] or 'default'}, seed {row['seed']}, alpha {row['alpha']}"
                groups.setdefault(name, []).append(
                    (100 * float(row["retention"]), 100 * float(row["target"]), settings)
                )
    else:
        learned, kept = (main_panel(part, every) for part in ("target", "retention"))
        if learned is None or kept is None:
            section.text = ["No run measured both what it learned and what it kept: there is nothing to draw."]
            return section
        x, y = (100 if panel.is_percent else 1 for panel in (kept, learned))
        for name, column in runs.items():
            pairs = [(run.get(kept.main), run.get(learned.main), number) for number, run in enumerate(column, 1)]
            groups[name] = [(x * k, y * t, f"{name}, run {n}") for k, t, n in pairs if k is not None and t is not None]
        labels = charts.axis_label("kept", kept), charts.axis_label("learned", learned)
    for name, points in groups.items():
        groups[name] = [(k, t, f"{what}: learned {t:.4g}, kept {k:.4g}") for k, t, what in points]
    section.charts = [charts.plane("Each mark is a model; hover for its name", groups, *labels)]
    return section


def configuration(folder: Path) -> str:
    """Return the commands of the finished fits, one a line."""
    words = [json.loads(file.read_text(encoding="utf-8"))["words"] for file in sorted(folder.glob("*/*/finished.json"))]
    return "\n".join(f"flow-lightning {' '.join(each)}" for each in words)
