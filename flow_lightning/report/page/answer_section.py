"""What changed: lost samples, changed answers, and the accuracy of each class before and after training.

In: `RunFiles`. Out: a section. Next: `render.py`.
"""

from collections import Counter

from torch import Tensor

from flow_lightning.report.page import charts
from flow_lightning.report.page.files import RunFiles
from flow_lightning.report.page.section import Section, Table

_MOST_PAIRS = 20


def answer_section(run: RunFiles) -> Section:
    """Compare the answers before and after training, of the retention set and of the target."""
    section = Section("What changed")
    _compare(section, run, "retention", "pretrained_names", "Pre-trained task")
    _compare(section, run, "target", "class_names", "Target")
    for lost in run.evidence.lost:
        named = {
            when: run.name(lost[when], "pretrained_names") for when in ("given", "before", "after") if when in lost
        }
        card = {"index": lost["index"], "class": named.get("given", named["before"]), "facts": named, "lists": ["lost"]}
        section.cards.append(card | {k: lost[k] for k in ("picture", "note") if k in lost})
    return section


def _compare(section: Section, run: RunFiles, part: str, names: str, title: str) -> None:
    given, before, after = (run.evidence.tensors.get(f"{part}/{when}") for when in ("given", "before", "after"))
    if before is None or after is None:
        section.text.append(f"{title}: the answers before and after training are not both known.")
        return
    changed, what = before != after, ""
    if given is not None:
        lost, won = (before == given) & (after != given), (before != given) & (after == given)
        what = f"; {int(lost.sum()):,} right ones were lost, {int(won.sum()):,} wrong ones were mended"
    section.text.append(f"{title}: {int(changed.sum()):,} of {len(changed):,} answers changed{what}.")
    pairs = Counter(zip(before[changed].tolist(), after[changed].tolist())).most_common(_MOST_PAIRS)
    rows = [[run.name(old, names), run.name(new, names), f"{count:,}"] for (old, new), count in pairs]
    section.tables.append(Table(f"{title}: the most frequent changes", ["before", "after", "samples"], rows))
    if given is not None:
        _by_class(section, run, (given, before, after), names, title)


def _by_class(section: Section, run: RunFiles, answers: tuple[Tensor, ...], names: str, title: str) -> None:
    """Add the accuracy of each class, those that lost most first."""
    given, *both = answers
    classes, members = given.unique(return_inverse=True)
    counts = members.bincount()
    before, after = (100 * members.bincount((chosen == given).double()) / counts for chosen in both)
    order = (after - before).argsort(stable=True).tolist()
    rows = [(run.name(int(classes[c]), names), float(before[c]), float(after[c]), int(counts[c])) for c in order]
    some = rows[: charts.MOST_CLASSES]
    of = "" if len(rows) == len(some) else f" (the {len(some)} of {len(rows)} classes that lost most)"
    section.charts.append(charts.accuracies(f"{title}: accuracy by class{of}", some))
    cells = [[name, f"{count:,}", f"{old:.1f}", f"{new:.1f}", f"{new - old:+.1f}"] for name, old, new, count in rows]
    header = ["class", "samples", "before", "after", "change"]
    section.tables.append(Table(f"{title}: accuracy of every class, in %", header, cells))
