"""What a board of fits shows: a row for each model, the frontier of each method, and how methods compare.

In: the numbers of all fits. Out: `comparison.md`, `frontier.png`, `board.csv`, `board.md`, `report.html`; a table.
Next: `frontier.py`.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from flow_lightning.files import write_bytes
from flow_lightning.report.frontier import Interval, Point, compare_methods
from flow_lightning.report.metrics import markdown_table, metrics_table, print_table, results_markdown

Settings = Mapping[str, Any]
#: Columns of `board.csv`.
COLUMNS = (
    *("method", "optimizer", "rate", "noise", "seed", "alpha", "target", "retention", "target_choosing"),
    *("retention_choosing", "is_chosen", "folder", "target_of", "target_hard"),
)
_SHARES = ("target@0.95", "target@0.98", "target@0.99", "retention@0.9", "retention@0.95", "retention@0.99")


def report(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Sequence[Settings],
    found: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """Print and draw what fits measured.

    Args:
        runs: Numbers of the fits by column, for the plain comparison.
        settings: Method, optimizer, rate, noise, seed and folder of each fit.
        found: The numbers of each fit, in the order of `settings`. Those of `RetentionBudgetCallback(curve=True)` are
            on the frontier.
        folder: Where the files go.
    """
    from flow_lightning.report.frontier_picture import plot_frontier  # matplotlib is slow to import
    from flow_lightning.report.page.render import write_page

    count = max(len(column) for column in runs.values())
    spread = f", mean ± standard deviation of {count} seeds" if count > 1 else ""
    rows = [row for setting, metrics in zip(settings, found) for row in _rows(setting, metrics)]
    is_one = all(len({setting[name] for setting in settings}) == 1 for name in ("rate", "noise"))
    if is_one:
        write_bytes(folder / "comparison.md", results_markdown(runs).encode())
        print_table(metrics_table(runs, f"What each method learned and what it kept{spread}"), "")
    if not rows:
        files = ["comparison.md"] * is_one + [write_page(folder).name]
        rank_zero_info(f"comparison.json, {', '.join(files)}: {folder.absolute()}")
        if not is_one:
            rank_zero_info("For the frontier add -c curve, with a validation and a test set.")
        return
    write_bytes(folder / "board.csv", _csv(rows).encode())
    panels: dict[str, list[Point]] = {}
    for row in rows:
        panels.setdefault(_title(row["noise"]), []).append(point_of(row))
    compared = {title: compare_methods(points, points[0].method) for title, points in panels.items()}
    texts = [_markdown(title, comparison, panels[title]) for title, comparison in compared.items()]
    write_bytes(folder / "board.md", "\n".join(texts).encode())
    budgets = [metrics["budget/keep"] for metrics in found if "budget/keep" in metrics]
    plot_frontier(panels, folder / "frontier.png", budgets, rows[0]["target_of"])
    if len({setting["rate"] for setting in settings}) > 1:
        for title, comparison in compared.items():
            print_table(_table(comparison, title), "")
    files = ["comparison.json", "board.csv", "board.md", "frontier.png", write_page(folder).name]
    for number, (title, points) in enumerate(panels.items(), start=1):
        is_last = number == len(panels)
        print_table(_table_of_ends(points, title), f"{', '.join(files)}: {folder.absolute()}" if is_last else "")


def _rows(settings: Settings, metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each point on the path of a fit; of text, what was learned is `exp(-loss)`.

    That is the geometric mean of the probabilities of the right tokens.
    """
    for point in metrics.get("path/points", ()):
        if {"test_top1", "target_top1"} <= point.keys():
            learned = ("accuracy", point["test_top1"], point["target_top1"])
        elif {"test_loss", "validation_loss"} <= point.keys():
            learned = ("token probability", math.exp(-point["test_loss"]), math.exp(-point["validation_loss"]))
        else:
            continue
        yield dict(settings) | {
            "alpha": point["alpha"],
            "target": learned[1],
            "retention": point["kept_other_half"],
            "target_choosing": learned[2],
            "retention_choosing": point["kept"],
            "is_chosen": int(point["alpha"] == metrics.get("budget/alpha")),
            "target_of": learned[0],
            "target_hard": point.get("test_hard_top1"),  # text has none
        }


def _title(noise: float | None) -> str:
    """Name a panel by its share of wrong labels.

    >>> _title(None), _title(0), _title(0.3)
    ('', 'Clean labels', '30 % wrong labels')
    """
    return "" if noise is None else f"{100 * noise:g} % wrong labels" if noise else "Clean labels"


def point_of(row: Mapping[str, Any]) -> Point:
    """Return the point of a row; a method with another optimizer is another method."""
    method = " ".join(name for name in (row["method"], row["optimizer"]) if name)
    chosen_by = (row["target_choosing"], row["retention_choosing"])
    place = (row["alpha"], row["target"], row["retention"], chosen_by, bool(row["is_chosen"]))
    hard = row.get("target_hard")
    return Point(method, row["seed"], row["rate"] or 0.0, *place, hard=math.nan if hard is None else hard)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(numbers: Mapping[str, Interval]) -> list[str]:
    """Write the numbers of one method: means, and differences with their intervals."""
    means = [100 * numbers[name][0] for name in _SHARES]
    cells = ["–" if math.isnan(mean) else f"{mean:.1f}" for mean in means]
    for name in ("gain@0.95", "gain@0.98", "gain@0.99", "area"):
        mean, low, high = (100 * value for value in numbers.get(name, (math.nan,) * 3))
        interval = "" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})"  # one seed has none
        cells.append("–" if math.isnan(mean) else f"{mean:+.1f}{interval}")
    return cells


_HEADER = [
    *(f"target at {share.partition('@')[2]}" for share in _SHARES[:3]),
    *(f"kept at {share.partition('@')[2]}" for share in _SHARES[3:]),
    *(f"gain at {share}" for share in ("0.95", "0.98", "0.99")),
    "area",
]


_ABOUT_ENDS = (
    "At the point of the budget, and at the ends of the path. At alpha 0 the body is the pre-trained one, so methods "
    "differ by their heads alone there. *Hard* is the target on the tenth of the test images with the highest losses "
    "before training."
)
#: What tables say of fits at the point of their budget and at alpha 1; the first are for the terminal, too.
_ENDS = ("alpha", "target", "kept", "target, alpha 1", "kept, alpha 1", "hard", "hard, alpha 1", "target, alpha 0")


def _ends(points: Sequence[Point]) -> Iterator[tuple[str, float, list[str]]]:
    """Yield method, rate and the cells of `_ENDS`: means over seeds, percent but for alpha."""
    for method, rate in dict.fromkeys((point.method, point.rate) for point in points):
        mine = [point for point in points if (point.method, point.rate) == (method, rate)]
        chosen = [p for p in mine if p.is_chosen]
        first, last = ([p for p in mine if p.alpha == alpha] for alpha in (0, 1))
        cells = [_mean([p.alpha for p in chosen], "{:.2g}", 1)]
        cells += [_mean([getattr(p, n) for p in ps]) for ps in (chosen, last) for n in ("target", "retention")]
        cells += [_mean([p.hard for p in ps]) for ps in (chosen, last)]
        yield method, rate, [*cells, _mean([p.target for p in first])]


def _table_of_ends(points: Sequence[Point], noise: str) -> Table:
    """Build the table of fits at the point of their budget and at alpha 1, without what only `board.md` has."""
    table = Table("", title=_titled(noise, "Within the budget, and fine-tuned (alpha 1): target and share kept, in %"))
    with_rate = any(point.rate for point in points)
    for name in (*["rate"] * with_rate, *_ENDS[:5]):
        table.add_column(name, justify="right")
    for method, rate, cells in _ends(points):
        table.add_row(method, *[f"{rate:g}"] * with_rate, *cells[:5])
    return table


def _titled(noise: str, title: str) -> str:
    return f"{noise}: {title[0].lower()}{title[1:]}" if noise else title


def _mean(values: Sequence[float], pattern: str = "{:.1f}", scale: float = 100) -> str:
    known = [value for value in values if not math.isnan(value)]
    return pattern.format(scale * statistics.fmean(known)) if known else "–"


def _table(comparison: Mapping[str, Mapping[str, Interval]], noise: str) -> Table:
    table = Table(title=_titled(noise, "Target under a budget, and share kept at a share of the best gain, in %"))
    table.add_column("")
    for method in comparison:
        table.add_column(method, justify="right")
    for name, *cells in zip(_HEADER, *map(_cells, comparison.values())):
        table.add_row(name, *cells)
    return table


def _markdown(title: str, comparison: Mapping[str, Mapping[str, Interval]], points: Sequence[Point]) -> str:
    """Write two Markdown tables; differences are to the first method, with 95 % intervals over seeds."""
    compared = markdown_table(_HEADER, [[method, *_cells(numbers)] for method, numbers in comparison.items()])
    rows = [[f"{method} {rate:g}" if rate else method, *cells] for method, rate, cells in _ends(points)]
    ends = markdown_table(_ENDS, rows)
    return "\n".join([*[f"**{title}**\n"] * bool(title), compared, _ABOUT_ENDS, "", ends])
