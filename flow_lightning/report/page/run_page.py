"""The page of a run: its sections, from its files alone.

In: `RunFiles`. Out: text, charts, cards and tables. Next: `render.py`.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from flow_lightning.method.flow import effective_sample_size
from flow_lightning.method.weights import TokenWeights
from flow_lightning.report.metrics import DECLARED, Metrics, format_value, main_panel, metric_rows
from flow_lightning.report.page import charts
from flow_lightning.report.page.files import RunFiles, is_issue, per_sample

_MOST_ROWS = 2000
_MOST_PAIRS = 20
#: A class that gets less than this part of its share of the weight counts as starved.
_STARVED = 0.5


@dataclass
class Table:
    """A table; `classes` has the class of each row for a filter, if there is one."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    classes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """A part of the page: sentences, charts by caption, cards of samples, tables."""

    title: str
    text: list[str] = field(default_factory=list)
    charts: list[tuple[str, Markup]] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def sections(run: RunFiles) -> Iterator[Section]:
    """Yield the sections of a run."""
    yield Section("In short", [" ".join(summary(run.metrics))])
    yield _path(run)
    yield _weights(run)
    yield _samples(run)
    yield _changes(run)
    yield _curves(run)
    known = {key for key, value in run.metrics.items() if isinstance(value, int | float)}
    rows = [
        [each.name, format_value(each, [run.metrics[each.key]])] for each in metric_rows(known) if each.key in known
    ]
    yield Section("All numbers", tables=[Table("metrics.json", ["", "value"], rows)])


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of Wilson for a share of n samples."""
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def summary(metrics: Metrics) -> list[str]:
    """Say what was learned, what was forgotten, and which budget was kept; a sentence each."""
    text = [sentence for part in ("target", "retention") if (sentence := _result(metrics, part))]
    if metrics.get("budget/kept") is not None:
        kept = metrics["budget/kept"] >= metrics["budget/keep"]
        text.append(
            f"The budget of {_percent(metrics['budget/keep'])} is {'kept' if kept else 'not kept'}: the model at alpha "
            f"{metrics['budget/alpha']:g} keeps {_percent(metrics['budget/kept'])}, surely "
            f"{_percent(metrics['budget/bound'])}, and {_percent(metrics['budget/kept_other_half'])} on the other half."
        )
    if metrics.get("flow/effective_sample_fraction") is not None:
        text.append(
            f"The weights leave an effective sample size of {metrics['flow/effective_sample_size']:,.0f}, "
            f"{_percent(metrics['flow/effective_sample_fraction'])} of the samples."
        )
    return text or ["The run has no results yet."]


def _result(metrics: Metrics, part: str) -> str:
    """Say what became of the first main result of a part, with its interval if it is a share."""
    panel = main_panel(part, [metrics]) or next(
        (p for p in DECLARED.panels if p.part == part and metrics.get(p.before) is not None), None
    )
    if panel is None:
        return ""
    before, after, n = metrics.get(panel.before), metrics.get(panel.main), metrics.get(f"{part}/samples")
    write = _percent if panel.is_percent else lambda value: f"{value:.3f}"
    name = f"{'Learned' if part == 'target' else 'Kept'}: the {panel.title}"
    if after is None:
        return f"{name} was {write(before)} before training, and is not measured after it."
    interval = ""
    if panel.is_percent and n:
        low, high = wilson(after, int(n))
        interval = f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %, {int(n):,} samples)"
    if before is None:
        return f"{name} is {write(after)}{interval}."
    verb = "stayed at" if write(before) == write(after) else "rose" if after > before else "fell"
    return (
        f"{name} {verb} {write(after) if verb == 'stayed at' else f'from {write(before)} to {write(after)}'}{interval}."
    )


def _path(run: RunFiles) -> Section:
    section, points = Section("Frontier: learned against kept"), run.metrics.get("path/points") or []
    if not points:
        section.text = ["The run has no path: RetentionBudgetCallback measures one. A board has a frontier, too."]
        return section
    learned = "target_top1" if "target_top1" in points[0] else "target_loss"
    scale, label = (100, "target accuracy (%)") if learned == "target_top1" else (1, "target loss (lower is better)")
    marks = [
        (
            100 * p["kept"],
            scale * p[learned],
            f"{run.folder.name}, alpha {p['alpha']:g}: kept {_percent(p['kept'])}, {label} {scale * p[learned]:.4g}",
        )
        for p in points
    ]
    section.charts = [
        (
            "The path from pre-trained (alpha 0) to fine-tuned (alpha 1)",
            charts.plane({"path": marks}, "kept (%)", label, True).markup,
        )
    ]
    return section


def _weights(run: RunFiles) -> Section:
    section, weights = Section("Losses and weights"), run.weights
    if weights is None:
        section.text = ["The run has no weights: plain fine-tuning, or it was stopped before scoring ended."]
        return section
    values, shares = weights.losses.float(), weights.weights.float()
    effective, unit = effective_sample_size(shares), "tokens" if isinstance(weights, TokenWeights) else "samples"
    section.text = [
        f"τ is {weights.temperature:.4g}. The effective sample size is {effective:,.0f} of {len(shares):,} {unit} ({effective / len(shares):.0%})."
    ]
    some = slice(None, None, -(-len(values) // 1_000_000))
    section.charts = [
        (
            f"Losses of the pre-trained model; dashed: τ ({unit})",
            charts.losses(values[some].numpy().astype(float), weights.temperature).markup,
        ),
        (
            f"Weights; dashed: the effective share of the {unit}",
            charts.weights(shares[some].numpy().astype(float), effective * len(shares[some]) / len(shares)).markup,
        ),
    ]
    if run.labels is None:
        section.text.append("Without labels nothing can be said by class.")
    else:
        _by_class(section, run, per_sample(values, run), per_sample(shares, run), run.labels)
    return section


def _by_class(section: Section, run: RunFiles, values: Tensor, shares: Tensor, labels: Tensor) -> None:
    """Add what each class gets, and say whether one is starved."""
    classes, members = labels.unique(return_inverse=True)
    counts = members.bincount().double()
    ratios = (members.bincount(shares.double()) / shares.double().sum()) / (counts / counts.sum())
    order = ratios.argsort().tolist()
    names = {each: run.name(int(classes[each])) for each in order}
    starved = [each for each in order if ratios[each] < _STARVED]
    if starved:
        listed = ", ".join(f"{names[each]} ({ratios[each]:.2f})" for each in starved[:8])
        section.text.append(
            f"FLOW starves {len(starved)} of {len(order)} classes: they get less than half of their share of the weight. "
            f"Lowest: {listed}."
        )
    else:
        section.text.append(
            f"FLOW starves no class. The lowest, {names[order[0]]}, gets {ratios[order[0]]:.2f} times its share of the weight."
        )
    some = order[: charts.MOST_CLASSES]
    of = "" if len(order) == len(some) else f" (the {len(some)} lowest of {len(order)} classes)"
    titles, kept = [names[each] for each in some], [int(classes[each]) for each in some]
    section.charts += [
        (
            f"Losses by class{of}",
            charts.losses_by_class(values.numpy().astype(float), labels.numpy(), kept, titles).markup,
        ),
        (f"Share of the weight by class{of}", charts.shares_of_weight(ratios[some].tolist(), titles, _STARVED).markup),
    ]
    rows = [
        [
            names[c],
            f"{int(counts[c]):,}",
            f"{counts[c] / counts.sum():.2%}",
            f"{ratios[c] * counts[c] / counts.sum():.2%}",
            f"{ratios[c]:.2f}",
        ]
        for c in order
    ]
    section.tables.append(
        Table("Every class", ["class", "samples", "share of samples", "share of weight", "ratio"], rows)
    )


def _samples(run: RunFiles) -> Section:
    section = Section("Samples")
    if run.weights is None and not run.issues:
        section.text = ["There are no losses and no suspected label errors to sort samples by."]
        return section
    losses = weights = torch.zeros(0)
    if run.weights is not None:
        losses, weights = per_sample(run.weights.losses, run), per_sample(run.weights.weights, run)
    suspects = sorted(
        (i for i, row in run.issues.items() if is_issue(row)), key=lambda i: float(run.issues[i]["label_score"])
    )
    order = losses.argsort(descending=True).tolist()
    ranks = {index: rank for rank, index in enumerate(order)}
    middle = len(order) / 2
    for name in sorted(run.evidence.shown, key=lambda name: ranks.get(int(name), 0)):
        index = int(name)
        lists = ["suspected"] if index in suspects else []
        lists += ["hardest" if ranks[index] < middle else "easiest"] if index in ranks else []
        section.cards.append(_card(run, index, losses, weights) | {"lists": lists})
    section.text = [
        f"{len(suspects):,} label errors are suspected."
        if run.issues
        else "Label errors were not looked for: there is no label_issues.csv."
    ]
    if run.labels is None:
        section.text.append("The run lists no labels, so samples cannot be sorted by class.")
    wanted = list(dict.fromkeys([*suspects, *order]))[:_MOST_ROWS]
    rows = [_row(run, index, losses, weights) for index in wanted]
    of = f"The {len(wanted):,} of {max(len(order), len(run.issues)):,} samples that come first: suspected label errors, then by loss"
    header = ["index", "given label", "predicted", "probability", "label score", "loss", "weight"]
    section.tables = [Table(of, header, rows, [row[1] for row in rows])]
    return section


def _given(run: RunFiles, index: int) -> str:
    if run.labels is not None:
        return run.name(int(run.labels[index]))
    return run.name(run.issues.get(index, {}).get("given_label", "–"))


def _row(run: RunFiles, index: int, losses: Tensor, weights: Tensor) -> list[str]:
    issue, answer = run.issues.get(index, {}), run.evidence.shown.get(str(index), {}).get("before", [])
    predicted = issue.get("predicted_label") or (answer[0] if answer else None)
    probability = issue.get("probability") or (answer[1] if len(answer) > 1 else None)
    numbers = [
        probability,
        issue.get("label_score"),
        *(values[index] if len(values) else None for values in (losses, weights)),
    ]
    written = ["–" if number in (None, "") else _number(float(number)) for number in numbers]
    return [str(index), _given(run, index), "–" if predicted is None else run.name(predicted), *written]


def _number(value: float) -> str:
    return "< 0.0001" if 0 < value < 1e-4 else f"{value:.3g}"


def _card(run: RunFiles, index: int, losses: Tensor, weights: Tensor) -> dict[str, Any]:
    """Return what a card shows of a sample: what there is to see, and its facts."""
    seen = run.evidence.shown[str(index)]
    row = _row(run, index, losses, weights)
    facts = {"given label": row[1], "loss": row[5], "weight": row[6]}
    if "before" not in seen and row[2] != "–":
        facts["predicted"] = f"{row[2]} ({row[3]})"
    facts |= {f"predicted {when}": _answer(run, seen[when]) for when in ("before", "after") if when in seen}
    card = {
        "index": index,
        "class": row[1],
        "facts": facts,
        **{k: seen[k] for k in ("picture", "text", "note", "tokens") if k in seen},
    }
    if "tokens" in seen and isinstance(run.weights, TokenWeights):
        own = slice(*run.weights.offsets[index : index + 2].tolist())
        answer = seen["tokens"]["answer"]
        card["weights"] = run.weights.weights[own].tolist()[: len(answer)]
    return card


def _answer(run: RunFiles, answer: list[float], names: str = "class_names") -> str:
    return run.name(int(answer[0]), names) + "".join(f" ({value:.0%})" for value in answer[1:])


def _changes(run: RunFiles) -> Section:
    """Show lost retention samples, changed answers, and the accuracy of each class before and after."""
    section, tensors = Section("What changed"), run.evidence.tensors
    for part, names, title in (
        ("retention", "pretrained_names", "Pre-trained task"),
        ("target", "class_names", "Target"),
    ):
        answers = {when: tensors.get(f"{part}/{when}") for when in ("given", "before", "after")}
        given, before, after = answers.values()
        if before is None or after is None:
            section.text.append(f"{title}: the answers before and after training are not both known.")
            continue
        changed = before != after
        section.text.append(
            f"{title}: {int(changed.sum()):,} of {len(changed):,} answers changed{_outcome(given, before, after)}."
        )
        pairs = Counter(zip(before[changed].tolist(), after[changed].tolist())).most_common(_MOST_PAIRS)
        rows = [[run.name(old, names), run.name(new, names), f"{count:,}"] for (old, new), count in pairs]
        section.tables.append(
            Table(f"{title}: the most frequent changes of the answer", ["before", "after", "samples"], rows)
        )
        if given is not None:
            _class_accuracies(section, run, (given, before, after), names, title)
    for lost in run.evidence.lost:
        facts = {
            when: run.name(lost[when], "pretrained_names") for when in ("given", "before", "after") if when in lost
        }
        section.cards.append(
            {"index": lost["index"], "class": facts.get("given", facts["before"]), "facts": facts, "lists": ["lost"]}
            | {k: lost[k] for k in ("picture",) if k in lost}
        )
    return section


def _outcome(given: Tensor | None, before: Tensor, after: Tensor) -> str:
    if given is None:
        return ""
    lost, won = (before == given) & (after != given), (before != given) & (after == given)
    return f"; {int(lost.sum()):,} right ones were lost, {int(won.sum()):,} wrong ones mended"


def _class_accuracies(
    section: Section, run: RunFiles, answers: tuple[Tensor, Tensor, Tensor], names: str, title: str
) -> None:
    given, before, after = answers
    classes, members = given.unique(return_inverse=True)
    counts = members.bincount().double()
    first, last = (100 * members.bincount((chosen == given).double()) / counts for chosen in (before, after))
    order = (last - first).argsort().tolist()
    some, labels = order[: charts.MOST_CLASSES], {each: run.name(int(classes[each]), names) for each in order}
    of = "" if len(order) == len(some) else f" (the {len(some)} of {len(order)} classes that lost most)"
    drawn = charts.accuracies(
        first[some].tolist(), last[some].tolist(), [labels[c] for c in some], counts[some].int().tolist()
    )
    section.charts.append((f"{title}: accuracy by class{of}", drawn.markup))
    rows = [
        [labels[c], f"{int(counts[c]):,}", f"{first[c]:.1f}", f"{last[c]:.1f}", f"{last[c] - first[c]:+.1f}"]
        for c in order
    ]
    section.tables.append(
        Table(f"{title}: accuracy of every class, in %", ["class", "samples", "before", "after", "change"], rows)
    )


def _curves(run: RunFiles) -> Section:
    section, epochs = Section("Training"), run.metrics.get("retention/epochs") or []
    if run.evidence.curve:
        points = [(row["step"], row["loss"]) for row in run.evidence.curve if math.isfinite(row["loss"])]
        section.charts.append(
            ("Training loss", charts.lines("Training loss by step", "step", "loss", {"loss": points}).markup)
        )
    names = [
        name for name in (epochs[0] if epochs else {}) if name not in ("epoch", "step") and not name.startswith("kl")
    ]
    of_epochs = {name: [(row["epoch"], row[name]) for row in epochs if row.get(name) is not None] for name in names}
    if kept := {name: points for name, points in of_epochs.items() if points}:
        section.charts.append(
            ("Kept, measured on the way", charts.lines("What was kept, by epoch", "epoch", "kept", kept).markup)
        )
    if not section.charts:
        section.text = [
            "There is no curve: ReportCallback notes the loss, RetentionCallback(every_n_epochs=1) what is kept."
        ]
    return section
