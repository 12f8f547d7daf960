"""The page of a run: what it learned and forgot, its path, its curves; samples and answers have files of their own.

In: `RunFiles`. Out: sections. Next: `sample_sections.py`.
"""

import math
from collections.abc import Iterator

from flow_lightning.report.metrics import DECLARED, Metrics, filled_rows, main_panel
from flow_lightning.report.page import charts
from flow_lightning.report.page.answer_section import answer_section
from flow_lightning.report.page.files import RunFiles
from flow_lightning.report.page.sample_sections import sample_section, weight_section
from flow_lightning.report.page.section import Section, Table, percent
from flow_lightning.report.page.text_section import text_section


def sections(run: RunFiles) -> Iterator[Section]:
    """Yield the sections of a run."""
    yield Section("In short", [" ".join(summary(run.metrics))])
    yield _path(run)
    yield weight_section(run)
    yield sample_section(run)
    if texts := text_section(run):
        yield texts
    changed = answer_section(run)
    if changed.tables or not run.holds_texts:
        yield changed
    yield _curves(run)
    if rows := [[metric.name, *cells] for metric, cells in filled_rows([[run.metrics]])]:
        yield Section("All numbers", tables=[Table("metrics.json", ["", "value"], rows)])


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of Wilson for a share of n independent samples."""
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def summary(metrics: Metrics) -> list[str]:
    """Say what was learned, what was forgotten, and which budget was kept; a sentence each."""
    text = [sentence for part in ("target", "retention") if (sentence := _result(metrics, part))]
    if metrics.get("budget/kept") is not None:
        keep, kept, bound, other = (
            percent(metrics[f"budget/{n}"]) for n in ("keep", "kept", "bound", "kept_other_half")
        )
        is_kept = "kept" if metrics["budget/bound"] >= metrics["budget/keep"] else "not kept"
        text.append(
            f"The budget of {keep} is {is_kept}: the model at alpha {metrics['budget/alpha']:g} keeps {kept}, surely "
            f"{bound}, and {other} on the other half."
        )
    if metrics.get("flow/effective_sample_fraction") is not None:
        share = percent(metrics["flow/effective_sample_fraction"])
        text.append(f"The weights leave an effective sample size of {share} of the samples.")
    return text or ["The run has no results yet."]


def _result(metrics: Metrics, part: str) -> str:
    """Say what became of the first main result of a part, with its interval if it is a share."""
    known = [p for p in DECLARED.panels if p.part == part and metrics.get(p.before) is not None]
    panel = main_panel(part, [metrics]) or next(iter(known), None)
    if panel is None:
        return ""
    before, after, n = metrics.get(panel.before), metrics.get(panel.main), metrics.get(f"{part}/samples")
    write = percent if panel.is_percent else "{:.3f}".format
    name = f"{'Learned' if part == 'target' else 'Kept'}: {panel.title}"
    if after is None:
        return f"{name} was {write(before or 0.0)} before training, and is not measured after it."
    interval = ""
    if panel.is_percent and n:
        low, high = wilson(after, int(n))
        interval = f" (95 % interval {100 * low:.1f} to {percent(high)}, {int(n):,} samples)"
    if before is None or write(before) == write(after):
        return f"{name} {'is' if before is None else 'stayed at'} {write(after)}{interval}."
    return f"{name} {'rose' if after > before else 'fell'} from {write(before)} to {write(after)}{interval}."


def _path(run: RunFiles) -> Section:
    section, points = Section("Frontier: learned against kept"), run.metrics.get("path/points") or []
    if not points:
        section.text = ["The run has no path: RetentionBudgetCallback measures one. A board has a frontier, too."]
        return section
    name = "target_top1" if "target_top1" in points[0] else "target_loss"
    scale, label = (
        (100, "validation accuracy (%)") if name == "target_top1" else (1, "loss of training samples (lower is better)")
    )
    marks = [
        (
            100 * p["kept"],
            scale * p[name],
            f"alpha {p['alpha']:g}: kept {percent(p['kept'])}, {label} {scale * p[name]:.4g}",
        )
        for p in points
    ]
    caption = f"The path of {run.folder.name} from pre-trained (alpha 0) to fine-tuned (alpha 1)"
    section.charts = [charts.plane(caption, {"path": marks}, "kept (%)", label, True)]
    return section


def _curves(run: RunFiles) -> Section:
    section, epochs = Section("Training"), run.metrics.get("retention/epochs") or []
    losses = [(row["step"], row["loss"]) for row in run.evidence.curve if math.isfinite(row["loss"])]
    if losses:
        section.charts.append(charts.lines("Training loss", "step", "loss", {"loss": losses}))
    panel = main_panel("retention", [run.metrics])
    scale, label = (100, "kept (%)") if panel is None or panel.is_percent else (1, panel.title)
    names = [name for name in (epochs[0] if epochs else {}) if not name.startswith(("epoch", "step", "kl"))]
    kept = {name: [(row["epoch"], scale * row[name]) for row in epochs if row.get(name) is not None] for name in names}
    if kept := {name: points for name, points in kept.items() if points}:
        section.charts.append(charts.lines("Kept, measured on the way", "epoch", label, kept))
    if not section.charts:
        section.text = ["No curve: ReportCallback notes the loss, RetentionCallback(every_n_epochs=1) what is kept."]
    return section
