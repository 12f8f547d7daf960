"""`metrics.json`, what its keys mean, and the table on the console.

In: numbers by key. Out: a file, a table. Next: `pictures.py`.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from flow_lightning.files import write_bytes
from flow_lightning.measures import MEASURES, Measure, Metric, Panel

Metrics = dict[str, Any]

_AVERAGES = (
    Metric("average", "average of target and pre-trained task", "fraction", "up"),
    Metric("average_original_bn", "average, original BatchNorm", "fraction", "up"),
)
_OTHERS = (
    Metric("edits/dropped", "training samples dropped by hand", "samples"),
    Metric("edits/relabelled", "training samples relabelled by hand", "samples"),
    Metric("flow/temperature", "temperature tau", "number"),
    Metric("flow/mean_weight", "mean weight", "number"),
    Metric("flow/effective_sample_size", "effective sample size", "samples"),
    Metric("flow/effective_sample_fraction", "effective share of the samples", "fraction"),
    Metric("probe/strength", "regularisation of the linear probe", "number"),
    Metric("probe/mean_loss", "mean training loss of the linear probe", "nats"),
    Metric("refit/strength", "regularisation of the refitted head", "number"),
)
_BUDGET = (
    Metric("budget/alpha", "point of the path: 0 pre-trained, 1 fine-tuned", "number"),
    Metric("budget/keep", "budget: share to keep", "fraction"),
    Metric("budget/kept", "share kept, on the half that chose", "fraction", "up"),
    Metric("budget/bound", "share surely kept", "fraction", "up"),
    Metric("budget/kept_other_half", "share kept, on the other half", "fraction", "up"),
    Metric("budget/target_top1", "validation accuracy at that point, head on the path", "fraction", "up"),
    Metric("budget/target_top1_free", "validation accuracy without the budget", "fraction", "up"),
    Metric("budget/target_loss", "loss at that point: validation, else training samples", "nats", "down"),
    Metric("budget/target_loss_free", "the same loss without the budget", "nats", "down"),
    Metric("budget/forwards", "samples that the budget has scored", "samples"),
)
_TIMES = (
    Metric("time/probe_s", "fitting the linear probe", "seconds", "down"),
    Metric("time/scoring_s", "scoring the training set", "seconds", "down"),
    Metric("time/refit_s", "refitting the head", "seconds", "down"),
    Metric("time/budget_s", "choosing a point within the budget", "seconds", "down"),
    Metric("time/before_s", "measuring before training", "seconds", "down"),
    Metric("time/fit_s", "training, with budget and head refit", "seconds", "down"),
    Metric("time/after_s", "measuring after training", "seconds", "down"),
    Metric("time/report_s", "gathering what the report shows", "seconds", "down"),
)
_FORMATS = {"fraction": "{:.1f}", "nats": "{:.3f}", "samples": "{:,.0f}", "tokens": "{:,.0f}", "seconds": "{:.1f}"}
#: Columns that the names of rows get in any case, and that a column needs for its lines.
_NAMES, _PADDING = 30, 3
_SIZES = ("samples", "tokens")  # units of metrics that stand after the results


class Declared(NamedTuple):
    """What tables and pictures can show, in this order."""

    metrics: tuple[Metric, ...]
    panels: tuple[Panel, ...]


def declared_by(measures: Iterable[Measure | type[Measure]] = ()) -> Declared:
    """Return what the measures of this library declare, and further measures, once for each key."""
    of_all = [*MEASURES, *measures]
    results, sizes = (
        [metric for measure in of_all for metric in measure.metrics if (metric.unit in _SIZES) == is_size]
        for is_size in (False, True)
    )
    metrics = {metric.key: metric for metric in (*results, *_AVERAGES, *_BUDGET, *_OTHERS, *sizes, *_TIMES)}
    panels = {panel.title: panel for measure in of_all for panel in measure.panels}
    return Declared(tuple(metrics.values()), tuple(panels.values()))


#: What this library's own measures, FLOW and the probe declare.
DECLARED = declared_by()
METRICS = DECLARED.metrics


def main_panel(part: str, runs: Sequence[Mapping[str, Any]], declared: Declared = DECLARED) -> Panel | None:
    """Return the first panel of `target` or `retention` whose main result some run has."""
    panels = (panel for panel in declared.panels if panel.part == part)
    return next((panel for panel in panels if any(run.get(panel.main) is not None for run in runs)), None)


def averages(metrics: Mapping[str, Any], declared: Declared = DECLARED) -> Metrics:
    """Average what was learned and what was kept, if both are fractions, for both kinds of BatchNorm."""
    of_fractions = declared._replace(panels=tuple(panel for panel in declared.panels if panel.is_percent))
    learned, kept = (main_panel(part, [metrics], of_fractions) for part in ("target", "retention"))
    if learned is None or kept is None:
        return {}
    kinds = [kind for kind in ("", "_original_bn") if kept.main + kind in metrics]
    return {f"average{kind}": (metrics[learned.main] + metrics[kept.main + kind]) / 2 for kind in kinds}


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, atomically; its folder is made if absent. NaN and infinity, which JSON lacks, are null."""
    text = json.dumps(finite(metrics), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_metrics(path: str | Path) -> Metrics:
    """Read a `metrics.json`; a number that was not finite comes back as None, and a ValueError names a damaged file."""
    try:
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(metrics, dict):
            raise ValueError(f"a JSON {type(metrics).__name__}, expected an object")
    except ValueError as error:
        raise ValueError(f"{path} holds no metrics ({error}). Delete or mend it, then run again.") from error
    return metrics


def finite(value: Any) -> Any:
    """Replace every number that is not finite by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_value(metric: Metric, values: Sequence[float]) -> str:
    """Write one value, or the mean and the standard deviation (n - 1) of several runs; a dash if there is none.

    >>> format_value(Metric("target/top1", "target accuracy", "fraction"), [0.5, 0.52])
    '51.0 ± 1.4 %'
    """
    if not values:
        return "–"
    pattern = _FORMATS.get(metric.unit, "{:.4g}")
    scale, suffix = (100, " %") if metric.unit == "fraction" else (1, "")
    scaled = [scale * value for value in values]
    spread = f" ± {pattern.format(statistics.stdev(scaled))}" if len(scaled) > 1 else ""
    return pattern.format(statistics.fmean(scaled)) + spread + suffix


def metrics_table(
    columns: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    title: str = "",
    declared: Declared = DECLARED,
) -> Table:
    """Build the console table: a row for each declared key that some run has, a column for each method.

    A column is the metrics of a run, or of several, which become mean ± standard deviation.
    """
    table = Table("", title=title or None)
    for name in columns:
        table.add_column(name, justify="right")
    runs = [[column] if isinstance(column, Mapping) else column for column in columns.values()]
    for metric, cells in filled_rows(runs, declared):
        table.add_row(metric.name + {"seconds": " (s)", "nats": " (nats)"}.get(metric.unit, ""), *cells)
    return table


def filled_rows(
    columns: Sequence[Sequence[Mapping[str, Any]]], declared: Declared = DECLARED
) -> Iterator[tuple[Metric, list[str]]]:
    """Yield each declared metric that some run has, with its cell for each column of runs."""
    for metric in metric_rows({key for column in columns for run in column for key in run}, declared):
        cells = [_cell(metric, column) for column in columns]
        if set(cells) != {format_value(metric, [])}:
            yield metric, cells


def _cell(metric: Metric, runs: Iterable[Mapping[str, Any]]) -> str:
    return format_value(metric, [run[metric.key] for run in runs if run.get(metric.key) is not None])


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table; the first column, which has no name, is on the left, the others on the right."""
    head = [f" {name} |" for name in header]
    lines = ["| |" + "".join(head), "|---|" + "---:|" * len(head)]
    return "\n".join([*lines, *("|" + "".join(f" {cell} |" for cell in row) for row in rows), ""])


def results_markdown(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write the Markdown table of a comparison: a row for each method, columns for what it learned and kept.

    The first row is the model before training. Of tasks in groups only the groups and their mean are shown.

    >>> print(results_markdown({"flow": [{"target/before/top1": 0.5, "target/top1": 0.75}]}))
    | | target accuracy |
    |---|---:|
    | before training | 50.0 % |
    | flow | 75.0 % |
    <BLANKLINE>
    """
    before = [_as_after(run) for column in runs.values() for run in column]
    rows = {"before training": [run | averages(run) for run in before], **runs}
    keys = {key for column in runs.values() for run in column for key in run}
    columns = [metric for metric in metric_rows(keys) if metric.key in keys and _is_result(metric, keys)]
    cells = [[name, *(_cell(metric, column) for metric in columns)] for name, column in rows.items()]
    return markdown_table([metric.name.replace("|", "\\|") for metric in columns], cells)


def _as_after(run: Mapping[str, Any]) -> Metrics:
    """Return what was measured before training, by the keys of after it."""
    places = {"target/before/": "target/", "retention/before/": "retention/after/"}
    return {after + key.removeprefix(b): run[key] for b, after in places.items() for key in run if key.startswith(b)}


def _is_result(metric: Metric, keys: Iterable[str]) -> bool:
    """Whether a metric says what was learned or kept, and no group of tasks says it better."""
    part = next((part for part in ("target/", "retention/after/", "average") if metric.key.startswith(part)), None)
    if part is None or not metric.better or metric.key.startswith("target/before/"):
        return False
    groups = sum(key.startswith(f"{part}group/") for key in keys)
    is_mean, is_task = metric.key == f"{part}accuracy", metric.key.startswith(f"{part}task/")
    return not (is_task and groups) and not (is_mean and groups == 1)


def metric_rows(keys: Iterable[str], declared: Declared = DECLARED) -> Iterator[Metric]:
    """Yield the declared metrics; one for many keys becomes one for each key that there is."""
    for metric in declared.metrics:
        start, is_many, _ = metric.key.partition("*")
        for key in sorted(key for key in keys if is_many and key.startswith(start)):
            yield metric._replace(key=key, name=metric.name.replace("*", key.removeprefix(start)))
        if not is_many:
            yield metric


def path_table(points: Sequence[Mapping[str, float]], alpha: float, of: str) -> Table:
    """Build the table of a path: a row for each point, the chosen one marked."""
    with_top1 = "target_top1" in points[0]  # of validation samples alone
    samples, title = "validation" if with_top1 else "training", "The path from pre-trained to fine-tuned"
    table = Table("", "alpha", f"{of} kept", "surely", f"{samples} loss", title=title)
    if with_top1:
        table.add_column("validation accuracy")
    for point in points:
        row = [f"{point['alpha']:g}", f"{100 * point['kept']:.1f} %", f"{100 * point['bound']:.1f} %"]
        row += [f"{point['target_loss']:.3f}"] + ([f"{100 * point['target_top1']:.1f} %"] if with_top1 else [])
        table.add_row("chosen" if point["alpha"] == alpha else "", *row)
    return table


def print_table(table: Table, last_line: str) -> None:
    """Print a table, at most 80 columns wide, and a line below it that is not broken.

    Columns that find no room stand in tables below it, each with the first column again.
    """
    console = Console()
    for part in _parts(table, min(80, console.width)):
        console.print(part)
    console.print(last_line, soft_wrap=True, highlight=False)


def _parts(table: Table, width: int) -> Iterator[Table]:
    """Split a table by columns so that no cell of a part is broken; only names of rows and of columns may be."""
    first, *others = ([str(column.header), *map(str, column.cells)] for column in table.columns)
    widths = [max(map(cell_len, [*header.split(), *cells, ""])) for header, *cells in others]
    spare = width - 1 - sum(each + _PADDING for each in widths) - _PADDING
    names = min(max(map(cell_len, first)), max(spare, _NAMES))
    widths = [min(each, width - 1 - names - 2 * _PADDING) for each in widths]
    title, at = table.title, 0
    while at < len(others):
        part, left = Table(title=title), width - 1 - names - _PADDING
        part.add_column(first[0], width=names, overflow="fold")
        end = at
        while end < len(others) and (left := left - widths[end] - _PADDING) >= 0:
            justify = table.columns[end + 1].justify
            part.add_column(others[end][0], width=widths[end], justify=justify, overflow="fold")
            end += 1
        for row in zip(first[1:], *(column[1:] for column in others[at:end])):
            part.add_row(*row)
        yield part
        title, at = None, end
