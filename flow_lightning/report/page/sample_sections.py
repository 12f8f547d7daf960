"""Losses and weights, by class too, and the samples themselves: hardest, easiest, suspected label errors.

In: `RunFiles`. Out: two sections. Next: `answer_section.py`.
"""

from typing import Any

import torch
from torch import Tensor

from flow_lightning.method.flow import effective_sample_size
from flow_lightning.method.weights import TokenWeights
from flow_lightning.report.page import charts
from flow_lightning.report.page.files import RunFiles, is_issue, sample_means
from flow_lightning.report.page.section import Section, Table

_MOST_ROWS = 2000
#: Losses and weights that a histogram is made of.
_MOST_VALUES = 1_000_000
#: A class that gets less than this part of its share of the weight counts as starved.
_STARVED = 0.5


def weight_section(run: RunFiles) -> Section:
    """Show losses, weights, temperature and effective sample size, and what each class gets."""
    section, weights = Section("Losses and weights"), run.weights
    if weights is None:
        section.text = ["The run has no weights: plain fine-tuning, or it was stopped before scoring ended."]
        return section
    shares, unit = weights.weights.float(), "tokens" if isinstance(weights, TokenWeights) else "samples"
    effective = effective_sample_size(shares)
    part = effective / len(shares)
    section.text = [
        f"τ is {weights.temperature:.4g}. The effective sample size is {effective:,.0f} of {len(shares):,} {unit} "
        f"({part:.0%})."
    ]
    some = slice(None, None, -(-len(shares) // _MOST_VALUES))
    section.charts = [
        charts.losses(weights.losses[some].double().numpy(), weights.temperature, unit),
        charts.weights(shares[some].double().numpy(), part, unit),
    ]
    if run.labels is None:
        section.text.append("Without labels nothing can be said by class.")
    else:
        _by_class(section, run, run.labels, *sample_means(weights))
    return section


def _by_class(section: Section, run: RunFiles, labels: Tensor, losses: Tensor, weights: Tensor) -> None:
    """Add what each class gets, and say whether one is starved."""
    classes, members = labels.unique(return_inverse=True)
    counts = members.bincount().double() / len(labels)
    shares = members.bincount(weights.double()) / weights.double().sum()
    ratios = shares / counts
    order = ratios.argsort().tolist()
    names = [run.name(int(each)) for each in classes]
    starved = [f"{names[each]} ({ratios[each]:.2f})" for each in order if ratios[each] < _STARVED]
    section.text.append(
        f"FLOW starves classes: {len(starved)} of {len(order)} get less than half of their share of the weight. "
        f"Lowest: {', '.join(starved[:8])}."
        if starved
        else f"FLOW starves no class: {names[order[0]]} gets least, {ratios[order[0]]:.2f} of its share of the weight."
    )
    some = order[: charts.MOST_CLASSES]
    of = "" if len(order) == len(some) else f" (the {len(some)} lowest of {len(order)} classes)"
    titles = [names[each] for each in some]
    section.charts += [
        charts.losses_by_class(f"Losses by class{of}", losses.double().numpy(), members.numpy(), some, titles),
        charts.shares_of_weight(f"Share of the weight by class{of}", ratios[some].tolist(), titles, _STARVED),
    ]
    sizes = members.bincount().tolist()
    rows = [[names[c], f"{sizes[c]:,}", f"{counts[c]:.2%}", f"{shares[c]:.2%}", f"{ratios[c]:.2f}"] for c in order]
    header = ["class", "samples", "share of samples", "share of weight", "ratio"]
    section.tables.append(Table("Losses and weights of every class", header, rows))


def sample_section(run: RunFiles) -> Section:
    """Show suspected label errors, the hardest and the easiest samples, and a table."""
    section = Section("Samples")
    if run.weights is None and not run.issues:
        section.text = ["There are no losses and no suspected label errors to sort samples by."]
        return section
    numbers = () if run.weights is None else sample_means(run.weights)
    order = numbers[0].argsort(descending=True, stable=True).tolist() if numbers else []
    ranks = {index: rank for rank, index in enumerate(order)}
    issues = {index: float(row["label_score"]) for index, row in run.issues.items() if is_issue(row)}
    suspects = sorted(issues, key=lambda index: issues[index])
    for index in sorted(map(int, run.evidence.shown), key=lambda index: ranks.get(index, 0)):
        lists = ["suspected"] * (index in issues)
        lists += ["hardest" if ranks[index] < len(order) / 2 else "easiest"] if index in ranks else []
        section.cards.append(_card(run, index, numbers) | {"lists": lists})
    section.text = [
        f"{len(suspects):,} label errors are suspected."
        if run.issues
        else "Label errors were not looked for: there is no label_issues.csv.",
        "Each card has the given label, and the model's answers before and after training with their probability.",
    ]
    if run.labels is None:
        section.text.append("The run lists no labels, so samples cannot be sorted by class.")
    wanted = list(dict.fromkeys([*suspects, *order]))[:_MOST_ROWS]
    rows = [_row(run, index, numbers) for index in wanted]
    of = f"{len(wanted):,} of {max(len(order), len(run.issues)):,} samples: suspected label errors, then by loss"
    header = ["index", "given label", "predicted", "probability", "label score", "loss", "weight"]
    section.tables = [Table(of, header, rows, [row[1] for row in rows])]
    return section


def _row(run: RunFiles, index: int, numbers: tuple[Tensor, ...]) -> list[str]:
    """Return the row of a sample: index, given and predicted label, probability, label score, loss, weight."""
    issue, answer = run.issues.get(index, {}), run.evidence.shown.get(str(index), {}).get("before", [])
    given = issue.get("given_label", "–") if run.labels is None else int(run.labels[index])
    predicted, probability = issue.get("predicted_label"), issue.get("probability")
    if answer and not predicted:
        predicted, probability = answer[0], answer[1] if len(answer) > 1 else None
    own: list[Any] = [each[index].item() for each in numbers] or [None, None]
    values = [probability, issue.get("label_score"), *own]
    return [str(index), run.name(given), "–" if predicted is None else run.name(predicted), *map(_number, values)]


def _number(value: Any) -> str:
    if value in (None, ""):
        return "–"
    return "< 0.0001" if 0 < float(value) < 1e-4 else f"{float(value):.3g}"


def _card(run: RunFiles, index: int, numbers: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return what a card shows of a sample: what there is to see, and its facts."""
    seen, (_, given, predicted, probability, score, loss, weight) = (
        run.evidence.shown[str(index)],
        _row(run, index, numbers),
    )
    facts = {"given": given, "loss": loss, "weight": weight}
    if index in run.issues:
        facts |= {"label score": score, "suggested": f"{predicted} ({probability})"}
    for when in ("before", "after"):
        if answer := seen.get(when):
            facts[when] = run.name(int(answer[0])) + "".join(f" ({share:.0%})" for share in answer[1:])
    card = {"index": index, "class": given, "facts": facts} | {
        k: seen[k] for k in ("picture", "text", "note", "tokens") if k in seen
    }
    if "tokens" in seen and isinstance(run.weights, TokenWeights):
        card["weights"] = run.weights.of(torch.tensor([index])).tolist()
    return card
