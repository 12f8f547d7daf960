"""`label_issues.csv`: which labels look wrong, one row for each training sample, for a person to read and edit.

In: a probe with out-of-fold losses. Out: the file, CSV or Parquet. Next: `page/sample_sections.py`, `data/edits.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flow_lightning.data.edits import columns_of, data_fingerprint
from flow_lightning.files import write_csv, write_parquet
from flow_lightning.method.probe import Probe

ISSUES_FILE = "label_issues.csv"


def check_no_edits(*paths: Path) -> None:
    """Refuse to write over files that a person has begun to edit: they have a column `action`, see `data/edits.py`."""
    for path in paths:
        if path.exists() and "action" in columns_of(path):
            raise FileExistsError(
                f"{path} has a column 'action': your edits, which a new fit in this directory would overwrite. Move "
                "the file, or choose another directory."
            )


def write_label_issues(path: Path, probe: Probe, class_names: Sequence[str] | None = None) -> None:
    """Write what a probe that was asked for folds thinks of each label, in the order of the samples.

    `label_score` is the probability that the given label is right, see `right_labels`. `probability` is that of the
    predicted one, by a probe that was not fitted on the sample. `is_label_issue` is by confident learning on the same
    probabilities. Labels are written as class names where they are known, else as indices. `fingerprint` is that of
    all labels, the same in each row: edits then know the data set that they were made for.

    Args:
        path: The file; a name that ends in `.parquet` makes it one, with numbers in full.
        probe: What `LinearProbeCallback(folds=...)` fits.
        class_names: By index.
    """
    given, predicted = probe.targets.tolist(), probe.predicted.tolist()
    fingerprint = data_fingerprint("labels", given)
    if class_names:
        names = {index: str(name) for index, name in enumerate(class_names)}
        given, predicted = ([names.get(label, str(label)) for label in labels] for labels in (given, predicted))
    columns: dict[str, list[Any]] = {
        "index": list(range(len(given))),
        "is_label_issue": probe.issues.tolist(),
        "label_score": probe.right.tolist(),
        "given_label": given,
        "predicted_label": predicted,
        "probability": probe.confidences.tolist(),
        "fingerprint": [fingerprint] * len(given),
    }
    (write_parquet if path.suffix == ".parquet" else write_csv)(path, columns)
