"""Instruction data on a page: loss by length and source, answers without end or that repeat the prompt, duplicates.

In: `RunFiles` with what `report/texts.py` found. Out: a section. Next: `section.py`.
"""

import numpy as np
from torch import Tensor

from flow_lightning.report.page import charts
from flow_lightning.report.page.files import RunFiles, sample_means
from flow_lightning.report.page.section import Section, Table
from flow_lightning.report.texts import is_misplaced

_BINS = 5
_MOST_ROWS = 500


def text_section(run: RunFiles) -> Section | None:
    """Show what was found in texts; None if the run has none."""
    found = {name: values for name, values in run.evidence.tensors.items() if name.startswith("text/")}
    if not found:
        return None
    unended, repeats, twin = found["text/unended"].bool(), found["text/repeats"].bool(), found["text/twin"]
    means = None if run.weights is None or len(run.weights) != len(twin) else sample_means(run.weights)
    losses = None if means is None else means[0]
    section = Section("Texts")
    section.text = [
        f"Of {len(twin):,} texts like an earlier one: {int((twin >= 0).sum()):,}; whose answer ends in the middle of a "
        f"sentence: {int(unended.sum()):,}; whose answer repeats a part of the prompt: {int(repeats.sum()):,}.",
        "All are in text_issues.csv. The option --drop-issues text_issues.csv leaves them out of the next fit. Add a "
        "column action with keep or drop to decide on each.",
    ]
    if means is not None:
        section.tables.append(_by_length(means[0], found["text/length"]))
        if "text/source" in found:
            _by_source(section, run, *means)
    misplaced = is_misplaced(found)
    if "text/right" in found:
        section.text.insert(1, f"Answers that look as if they belong to another prompt: {int(misplaced.sum()):,}.")
    for caption, chosen in (
        ("Answers that look as if they belong to another prompt", misplaced),
        ("Answers that end in the middle of a sentence", unended),
        ("Answers that repeat 20 tokens of their prompt", repeats),
        ("Duplicates and near-duplicates of an earlier sample", twin >= 0),
    ):
        if chosen.any():
            section.tables.append(_table(run, caption, chosen, losses, found))
    return section


def _by_length(losses: Tensor, lengths: Tensor) -> Table:
    """Return the mean loss of samples in bins of equal size, from short to long answers."""
    rows = []
    for part in lengths.argsort(stable=True).tensor_split(_BINS):
        if len(part):
            mean = losses[part].double().mean()
            rows.append([f"{lengths[part[0]]} to {lengths[part[-1]]}", f"{len(part):,}", f"{mean:.3f}"])
    return Table("Loss by length of the answer", ["tokens", "samples", "mean loss"], rows)


def _by_source(section: Section, run: RunFiles, losses: Tensor, weights: Tensor) -> None:
    """Add losses and weights of each source, the most frequent first; those without a kept name in one row."""
    names = [str(name) for name in run.evidence.words["sources"]]
    ranks = run.evidence.tensors["text/source"].long()
    if (rest := int(ranks.max()) + 1 - len(names)) > 0:
        names.append(f"{rest:,} other sources")
    members, rows = ranks.clamp_max(len(names) - 1), []
    for rank, name in enumerate(names):
        own, shares = (each[members == rank].double().numpy() for each in (losses, weights))
        numbers = (np.mean(own), np.median(own), np.mean(shares))
        rows.append([name, f"{len(own):,}", *(f"{number:.3f}" for number in numbers)])
    some = names[: charts.MOST_CLASSES]
    of = "" if len(some) == len(names) else f" (the {len(some)} most frequent)"
    values = losses.double().numpy(), members.numpy(), range(len(some)), some
    section.charts.append(charts.losses_by_class(f"Losses by source{of}", *values))
    header = ["source", "samples", "mean loss", "median loss", "mean weight"]
    section.tables.append(Table("Loss by source", header, rows))


def _table(run: RunFiles, caption: str, chosen: Tensor, losses: Tensor | None, found: dict[str, Tensor]) -> Table:
    """Return a row for each chosen sample, from high to low loss, with the beginning of its answer where it is kept."""
    indices = chosen.nonzero().flatten()
    if losses is not None:
        indices = indices[losses[indices].argsort(descending=True, stable=True)]
    words, rows = run.evidence.words.get("answers") or {}, []
    for index in indices[:_MOST_ROWS].tolist():
        twin = int(found["text/twin"][index])
        like = f"{twin} ({found['text/likeness'][index]:.2f})" if twin >= 0 else "–"
        loss = "–" if losses is None else f"{losses[index]:.3g}"
        rows.append([str(index), loss, str(int(found["text/length"][index])), like, words.get(str(index), "…")])
    shown = "" if len(indices) <= _MOST_ROWS else f" (the first {_MOST_ROWS} of {len(indices):,})"
    return Table(caption + shown, ["index", "loss", "tokens", "like sample", "answer"], rows)
