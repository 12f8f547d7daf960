"""`metrics.json`, what its keys mean, and the table on the console.

In: numbers by key. Out: a file, a table. Next: `pictures.py`.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from flow_lightning.files import write_bytes

Metrics = dict[str, Any]


class Metric(NamedTuple):
    """Describe one key of `metrics.json`.

    Attributes:
        key: The stable key.
        name: What a table calls it.
        unit: `fraction` (0 to 1, shown in percent), `nats`, `samples`, `tokens`, `seconds` or `number`.
        better: `up`, `down`, or nothing where neither end is good.
    """

    key: str
    name: str
    unit: str
    better: str = ""


METRICS = (
    Metric("target/before/top1", "target accuracy before training", "fraction", "up"),
    Metric("target/top1", "target accuracy", "fraction", "up"),
    Metric("target/hard_top1", "target accuracy on the samples hardest before training", "fraction", "up"),
    Metric("retention/before/top1", "pre-trained task before training", "fraction", "up"),
    Metric("retention/before/top5", "pre-trained task before training, top-5", "fraction", "up"),
    Metric("retention/after/top1", "pre-trained task, BatchNorm as trained", "fraction", "up"),
    Metric("retention/after/top5", "pre-trained task, BatchNorm as trained, top-5", "fraction", "up"),
    Metric("retention/after/top1_original_bn", "pre-trained task, original BatchNorm", "fraction", "up"),
    Metric("retention/after/top5_original_bn", "pre-trained task, original BatchNorm, top-5", "fraction", "up"),
    Metric("retention/after/agreement", "agreement with the pre-trained model", "fraction", "up"),
    Metric("retention/after/agreement_original_bn", "agreement, original BatchNorm", "fraction", "up"),
    Metric("retention/after/kl", "KL(pre-trained || fine-tuned)", "nats", "down"),
    Metric("retention/after/kl_original_bn", "KL, original BatchNorm", "nats", "down"),
    Metric("target/before/loss", "target loss before training", "nats", "down"),
    Metric("target/loss", "target loss", "nats", "down"),
    Metric("target/before/exact_match", "right final answers before training", "fraction", "up"),
    Metric("target/exact_match", "right final answers", "fraction", "up"),
    Metric("retention/before/perplexity", "perplexity of general text before training", "number", "down"),
    Metric("retention/after/perplexity", "perplexity of general text", "number", "down"),
    Metric("retention/before/accuracy", "mean accuracy of the tasks before training", "fraction", "up"),
    Metric("retention/after/accuracy", "mean accuracy of the tasks", "fraction", "up"),
    Metric("average", "average of target and pre-trained task", "fraction", "up"),
    Metric("average_original_bn", "average, original BatchNorm", "fraction", "up"),
    Metric("flow/temperature", "temperature tau", "number"),
    Metric("flow/mean_weight", "mean weight", "number"),
    Metric("flow/effective_sample_size", "effective sample size", "samples"),
    Metric("flow/effective_sample_fraction", "effective share of the samples", "fraction"),
    Metric("probe/strength", "regularisation of the linear probe", "number"),
    Metric("probe/mean_loss", "mean training loss of the linear probe", "nats"),
    Metric("target/samples", "target test samples", "samples"),
    Metric("retention/samples", "images of the pre-trained task", "samples"),
    Metric("retention/tokens", "predicted tokens of general text", "tokens"),
    Metric("time/probe_s", "fitting the linear probe", "seconds", "down"),
    Metric("time/scoring_s", "scoring the training set", "seconds", "down"),
    Metric("time/refit_s", "refitting the head", "seconds", "down"),
    Metric("time/before_s", "measuring before training", "seconds", "down"),
    Metric("time/fit_s", "training, with the head refit", "seconds", "down"),
    Metric("time/after_s", "measuring after training", "seconds", "down"),
)

_TASK = "retention/after/task/"  # and the task's name
_FORMATS = {
    "nats": "{:.3f}",
    "samples": "{:,.0f}",
    "tokens": "{:,.0f}",
    "seconds": "{:.1f}",
    "number": "{:.4g}",
}


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, atomically.

    JSON has no NaN and no infinity: they are written as null, so that every reader can parse the file.

    Args:
        path: The JSON file; its folder is made if absent.
        metrics: Keys of `METRICS` or others, values of JSON types.
    """
    text = json.dumps(_finite(dict(metrics)), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_metrics(path: str | Path) -> Metrics:
    """Read a `metrics.json`; a number that was not finite comes back as None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else than a JSON object.
    """
    try:
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Delete or mend it, then run again.") from error
    if not isinstance(metrics, dict):
        raise ValueError(
            f"{path} holds a JSON {type(metrics).__name__}, expected an object. Delete it, then run again."
        )
    return metrics


def _finite(value: Any) -> Any:
    """Replace every number that is not finite by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_value(metric: Metric, values: Sequence[float]) -> str:
    """Write one value, or the mean and the standard deviation (n - 1) of several runs.

    Args:
        metric: Gives the unit.
        values: One value per run; none gives a dash.

    >>> format_value(Metric("target/top1", "target accuracy", "fraction"), [0.5])
    '50.0 %'
    >>> format_value(Metric("target/top1", "target accuracy", "fraction"), [0.5, 0.52])
    '51.0 ± 1.4 %'
    """
    if not values:
        return "–"
    scale, pattern, suffix = (100, "{:.1f}", " %") if metric.unit == "fraction" else (1, _FORMATS[metric.unit], "")
    scaled = [scale * value for value in values]
    spread = f" ± {pattern.format(statistics.stdev(scaled))}" if len(scaled) > 1 else ""
    return pattern.format(statistics.fmean(scaled)) + spread + suffix


def metrics_table(columns: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]], title: str = "") -> Table:
    """Build the console table: a row for each documented key and each task that some run has, a column for each method.

    Args:
        columns: Method name to the metrics of its run, or of several runs, which become mean ± standard
            deviation.
        title: Printed above the table.
    """
    table = Table(title=title or None)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    runs = [[column] if isinstance(column, Mapping) else list(column) for column in columns.values()]
    for metric in _rows(runs):
        values = [[run[metric.key] for run in column if run.get(metric.key) is not None] for column in runs]
        if any(values):
            name = metric.name + (" (s)" if metric.unit == "seconds" else " (nats)" if metric.unit == "nats" else "")
            table.add_row(name, *(format_value(metric, column) for column in values))
    return table


def _rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Metric]:
    """Return what a table of these runs can show: `METRICS`, with the tasks after their mean."""
    keys = sorted({key for column in runs for run in column for key in run if key.startswith(_TASK)})
    tasks = [Metric(key, f"task {key.removeprefix(_TASK)}", "fraction", "up") for key in keys]
    place = 1 + [metric.key for metric in METRICS].index("retention/after/accuracy")
    return [*METRICS[:place], *tasks, *METRICS[place:]]


def metrics_markdown() -> str:
    """Write `METRICS` as the Markdown table of the README.

    >>> print(*metrics_markdown().splitlines()[:3], sep=chr(10))
    | key | meaning | unit | better |
    |---|---|---|---|
    | `target/before/top1` | target accuracy before training | fraction | up |
    """
    rows = (f"| `{m.key}` | {m.name.replace('|', chr(92) + '|')} | {m.unit} | {m.better} |" for m in METRICS)
    return "\n".join(("| key | meaning | unit | better |", "|---|---|---|---|", *rows))
