"""Losses and weights, by class too, and the samples themselves: hardest, easiest, suspected label errors.

In: `RunFiles`. Out: two sections. Next: `answer_section.py`.
"""

from typing import Any

import torch
from torch import Tensor

from flow_lightning.data.edits import is_issue
from flow_lightning.method.flow import effective_sample_size
from flow_lightning.method.weights import TokenWeights
from flow_lightning.report.page import charts
from flow_lightning.report.page.files import RunFiles, sample_means
from flow_lightning.report.page.section import Section, Table
from flow_lightning.report.pictures import some_values

_MOST_ROWS = 2000
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
    some_losses, some_shares = (each.double().numpy() for each in some_values(weights))
    section.charts = [
        charts.losses(some_losses, weights.temperature, unit),
        charts.weights(some_shares, part, unit),
    ]
    if run.labels is None and not run.holds_texts:
        section.text.append("Without labels nothing can be said by class.")
    elif run.labels is not None:
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
    section = Section("Samples", group="source" if _is_sorted_by_loss(run) else "class")
    if run.weights is None and not run.issues:
        section.text = [f"There are no losses {'' if run.holds_texts else 'and no suspected label errors '}to sort by."]
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
    section.text = _words(run, len(suspects))
    wanted = list(dict.fromkeys([*suspects, *order]))[:_MOST_ROWS]
    rows = [_columns(run, index, numbers) for index in wanted]
    first = "" if _is_sorted_by_loss(run) else "suspected label errors, then "
    of = f"{len(wanted):,} of {max(len(order), len(run.issues)):,} samples: {first}by loss"
    cells = [list(row.values()) for row in rows]
    section.tables = [Table(of, list(rows[0]), cells, [_group(row) for row in rows])]
    return section


def _is_sorted_by_loss(run: RunFiles) -> bool:
    """Tell whether samples are texts of which nobody asks for labels."""
    return run.holds_texts and not run.issues


def _words(run: RunFiles, suspects: int) -> list[str]:
    if _is_sorted_by_loss(run):
        shades = " The darker a token of it, the more weight it has." if isinstance(run.weights, TokenWeights) else ""
        return [f"Each card has the end of the prompt, in grey, and the answer.{shades}"]
    words = [
        f"{suspects:,} label errors are suspected."
        if run.issues
        else "Label errors were not looked for: there is no label_issues.csv.",
        "Each card has the given label, and the model's answers before and after training with their probability.",
    ]
    if suspects:
        words.append(
            "The option --drop-issues label_issues.csv leaves them out of the next fit. To decide on each, add a "
            "column action with drop, keep or the right label: --relabel takes that file."
        )
    if run.labels is None:
        words.append("The run lists no labels, so samples cannot be sorted by class.")
    return words


def _columns(run: RunFiles, index: int, numbers: tuple[Tensor, ...]) -> dict[str, str]:
    """Return the row of a sample by the names of the columns: what it is, what is said of it, its loss and weight."""
    own = [_number(each[index].item()) for each in numbers] or ["–", "–"]
    means = dict(zip(("loss", "weight"), own))
    if not _is_sorted_by_loss(run):
        return {"index": str(index)} | _answers(run, index) | means
    source, lengths = run.source(index), run.evidence.tensors.get("text/length")
    tokens = {} if lengths is None or index >= len(lengths) else {"tokens": str(int(lengths[index]))}
    return {"index": str(index)} | ({} if source is None else {"source": source}) | tokens | means


def _answers(run: RunFiles, index: int) -> dict[str, str]:
    """Return given and predicted label, probability and label score."""
    issue, answer = run.issues.get(index, {}), run.evidence.shown.get(str(index), {}).get("before", [])
    given = issue.get("given_label", "–") if run.labels is None else int(run.labels[index])
    predicted, probability = issue.get("predicted_label"), issue.get("probability")
    if answer and not predicted:
        predicted, probability = answer[0], answer[1] if len(answer) > 1 else None
    return {
        "given label": run.name(given),
        "predicted": "–" if predicted is None else run.name(predicted),
        "probability": _number(probability),
        "label score": _number(issue.get("label_score")),
    }


def _group(row: dict[str, str]) -> str:
    """Return what a filter goes by: the given label, or where a text comes from."""
    return row.get("given label", row.get("source", "–"))


def _number(value: Any) -> str:
    if value in (None, ""):
        return "–"
    return "< 0.0001" if 0 < float(value) < 1e-4 else f"{float(value):.3g}"


def _card(run: RunFiles, index: int, numbers: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return what a card shows of a sample: what there is to see, and its facts."""
    seen, row = run.evidence.shown[str(index)], _columns(run, index, numbers)
    facts = {"given": row["given label"]} if "given label" in row else {}
    facts |= {name: row[name] for name in ("source", "tokens", "loss", "weight") if name in row}
    if index in run.issues:
        facts |= {"label score": row["label score"], "suggested": f"{row['predicted']} ({row['probability']})"}
    for when in ("before", "after"):
        if answer := seen.get(when):
            facts[when] = run.name(int(answer[0])) + "".join(f" ({share:.0%})" for share in answer[1:])
    card = {"index": index, "class": _group(row), "facts": facts} | {
        k: seen[k] for k in ("picture", "text", "note", "tokens") if k in seen
    }
    if "tokens" in seen and isinstance(run.weights, TokenWeights):
        card["weights"] = run.weights.of(torch.tensor([index])).tolist()
    return card
