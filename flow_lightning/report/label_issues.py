"""`label_issues.csv`: which labels look wrong, one row for each training sample, for a person to read and edit.

In: a probe with out-of-fold losses. Out: the file. Next: `page/sample_sections.py`, `data/edits.py`.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from flow_lightning.files import write_bytes
from flow_lightning.method.probe import Probe

ISSUES_FILE = "label_issues.csv"
COLUMNS = ("index", "is_label_issue", "label_score", "given_label", "predicted_label", "probability")


def check_no_edits(path: Path) -> None:
    """Refuse to write over a file that a person has begun to edit: it has a column `action`, see `data/edits.py`."""
    if path.exists() and "action" in path.read_text(encoding="utf-8-sig").partition("\n")[0].strip().split(","):
        raise FileExistsError(
            f"{path} has a column 'action': your edits, which a new fit in this directory would overwrite. Move the "
            "file, or choose another directory."
        )


def write_label_issues(path: Path, probe: Probe, class_names: Sequence[str] | None = None) -> None:
    """Write what a probe that was asked for folds thinks of each label, in the order of the samples.

    `label_score` is the probability that the given label is right, see `right_labels`. `probability` is that of the
    predicted one, by a probe that was not fitted on the sample. `is_label_issue` is by confident learning on the same
    probabilities. Labels are written as class names where they are known, else as indices.
    """
    names = {index: str(name) for index, name in enumerate(class_names or ())}
    columns = (probe.issues, probe.right, probe.targets, probe.predicted, probe.confidences)
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(COLUMNS)
    for index, (issue, score, given, predicted, probability) in enumerate(zip(*(c.tolist() for c in columns))):
        labels = (names.get(label, label) for label in (given, predicted))
        writer.writerow([index, issue, f"{score:.6g}", *labels, f"{probability:.6g}"])
    write_bytes(path, content.getvalue().encode())
