"""A person's decisions about training samples: a CSV or Parquet file that drops samples and corrects labels.

In: `label_issues.csv` or `text_issues.csv` of a run, perhaps with a column `action`. Out: the samples to train on.
Next: `images.py`, and `edited.py` for data sets of your own.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flow_lightning.data.sources import LabelledImages
from flow_lightning.optional import optional_import
from flow_lightning.scoring.fingerprint import sample_fingerprint

_KEEP_OR_DROP = ("", "keep", "drop")
_ISSUES = ("is_label_issue", "is_text_issue")
Row = Mapping[str, str | None]


@dataclass(frozen=True)
class Edits:
    """What becomes of `n` samples."""

    kept: list[int]  #: positions of the samples to train on, in order
    labels: dict[int, int]  #: the new class index, by position, of those that get another one
    count: int  #: n

    @property
    def numbers(self) -> dict[str, int]:
        """How many samples were dropped and relabelled, as `metrics.json` has it."""
        return {"edits/dropped": self.count - len(self.kept), "edits/relabelled": len(self.labels)}

    def __str__(self) -> str:
        dropped, relabelled = self.numbers.values()
        return f"{dropped:,} of {self.count:,} training samples are dropped, {relabelled:,} get another label"

    def of_images(self, images: LabelledImages) -> LabelledImages:
        """Return the images to train on, with their new labels."""
        chosen = ((position, *images.samples[position]) for position in self.kept)
        return LabelledImages(((image, self.labels.get(p, label)) for p, image, label in chosen), images.read)


def read_edits(
    file: str | Path, targets: Sequence[int], class_names: Sequence[str] | None = None, *, drop_issues: bool = False
) -> Edits:
    """Read what is to become of samples with given labels.

    The file has the columns `index` and `action`, and may have others. `index` is the position of a sample in the
    training set of the run that wrote `label_issues.csv`. `action` is `keep` or nothing, `drop`, or the new label: the
    name of a class, else its index. The columns `given_label` and `fingerprint`, if there, have to agree with the
    labels of the data set. Samples without a row are kept.

    Args:
        file: A CSV file in UTF-8, with commas; one that ends in `.parquet` is read with pyarrow.
        targets: Class indices of the samples, `[n]`.
        class_names: Names of the classes by index; by default labels are indices up to the largest target.
        drop_issues: Whether nothing as `action` drops a sample that `is_label_issue` calls an issue. The file then
            needs no column `action`.

    Raises:
        ValueError: If the file does not fit the samples; the message names the first row that does not.
    """
    names = [str(name) for name in class_names or range(max(targets, default=-1) + 1)]
    labels: dict[int, int] = {}

    def relabel(index: int, row: Row, where: str) -> bool:
        given, label = row.get("given_label", str(targets[index])), _class_of(action := _action(row), names)
        if "given_label" in row and _class_of(given or "", names) != targets[index]:
            raise ValueError(
                f"{where}: given_label of sample {index} is {given!r}, in the data set it is "
                f"{names[targets[index]]!r}. The file was made for other data, or for another split of them."
            )
        if action in _KEEP_OR_DROP:
            return True
        if label is not None and label != targets[index]:
            labels[index] = label
        return label is not None

    some = f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}"
    known = f"keep, drop nor a class. Classes are {some}, or their indices"
    kept = _kept(file, len(targets), data_fingerprint("labels", targets), drop_issues, relabel, known)
    return Edits(kept, labels, len(targets))


def read_dropped(file: str | Path, tokens: Any, count: int, *, drop_issues: bool = False) -> Edits:
    """Read which of `count` texts to train on: `read_edits` for `text_issues.csv`, where `action` is no label.

    Args:
        file: As for `read_edits`.
        tokens: Of all texts, one after the other, for the fingerprint.
        count: Number of texts.
        drop_issues: As for `read_edits`, by `is_text_issue`.

    Raises:
        ValueError: If the file does not fit the texts; the message names the first row that does not.
    """

    def is_known(index: int, row: Row, where: str) -> bool:
        return _action(row) in _KEEP_OR_DROP

    fingerprint = data_fingerprint("tokens", tokens)
    return Edits(_kept(file, count, fingerprint, drop_issues, is_known, "keep nor drop"), {}, count)


def one_file(edits: str | None, drop_issues: str | None) -> str | None:
    """Return the file that one of two arguments names, or None; a ValueError if both do."""
    if edits is not None and drop_issues is not None:
        raise ValueError(
            f"edits is {edits} and drop_issues is {drop_issues}. Give one file as drop_issues: its actions count, and "
            "issues without an action are dropped."
        )
    return edits if drop_issues is None else drop_issues


def _kept(
    file: str | Path,
    count: int,
    fingerprint: str,
    drop_issues: bool,
    is_known: Callable[[int, Row, str], bool],
    known: str,
) -> list[int]:
    """Return the positions that are not dropped, in order, with each row looked at."""
    dropped, seen = set(), set()
    for where, row in _rows(file, drop_issues):
        index = _index(row["index"], count, where)
        if index in seen:
            raise ValueError(f"{where}: sample {index} has two rows. Leave one of them.")
        seen.add(index)
        if row.get("fingerprint", fingerprint) != fingerprint:
            raise ValueError(
                f"{where}: the fingerprint is {row['fingerprint']!r}, that of the samples here is {fingerprint!r}. The "
                "file was made for other data, for another split of them, or before earlier edits."
            )
        if not is_known(index, row, where):
            raise ValueError(f"{where}: action {_action(row)!r} of sample {index} is neither {known}.")
        if _action(row) == "drop" or (drop_issues and not _action(row) and is_issue(row)):
            dropped.add(index)
    if len(dropped) == count:
        raise ValueError(f"{file} drops all {count} samples, so nothing is left to train on.")
    return [index for index in range(count) if index not in dropped]


def _action(row: Row) -> str:
    return (row.get("action") or "").strip()


def is_issue(row: Row) -> bool:
    """Tell whether a row of `label_issues.csv` or `text_issues.csv` is a suspected error."""
    return any((row.get(column) or "").strip().lower() in ("true", "1") for column in _ISSUES)


def data_fingerprint(kind: Literal["labels", "tokens"], values: Any) -> str:
    """Return a hash of all labels or tokens of a data set, in order, as whole numbers.

    It starts with the word `kind`, so that a spreadsheet leaves it alone.

    >>> data_fingerprint("labels", [0, 1, 2]) == data_fingerprint("labels", (0, 1, 2))
    True
    >>> data_fingerprint("labels", [0, 1, 2]) == data_fingerprint("labels", [0, 2, 1])
    False
    """
    whole = np.asarray(values, dtype=np.int32 if kind == "tokens" else np.int64)
    return f"{kind}-{sample_fingerprint(whole)[:16]}"


def columns_of(file: str | Path) -> list[str]:
    """Return the names of the columns of a CSV or Parquet file."""
    if Path(file).suffix == ".parquet":
        return list(_parquet().read_schema(file).names)
    with open(file, newline="", encoding="utf-8-sig") as lines:  # spreadsheets begin a file with a mark
        return next(csv.reader(lines), [])


def _rows(file: str | Path, drop_issues: bool) -> Iterator[tuple[str, Row]]:
    """Read the rows of a file, each with its place."""
    columns = columns_of(file)
    wanted = "action" if not drop_issues else next((name for name in _ISSUES if name in columns), _ISSUES[0])
    if missing := [name for name in ("index", wanted) if name not in columns]:
        raise ValueError(
            f"{file} has no column {' and no column '.join(missing)}; its columns are {','.join(columns)!r}. Add it, "
            "in a CSV file with commas between columns."
        )
    if Path(file).suffix == ".parquet":
        for number, row in enumerate(_parquet().read_table(file).to_pylist(), start=1):
            yield f"{file}, row {number}", {name: None if cell is None else str(cell) for name, cell in row.items()}
        return
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        yield from ((f"{file}, line {reader.line_num}", row) for row in reader)


def _parquet() -> Any:
    return optional_import("pyarrow.parquet", "language", "Parquet files")


def _index(text: str | None, count: int, where: str) -> int:
    text = (text or "").strip()
    if not text.isdecimal() or int(text) >= count:
        raise ValueError(f"{where}: there is no sample {text!r}; the training set has indices 0 to {count - 1}.")
    return int(text)


def _class_of(text: str, names: Sequence[str]) -> int | None:
    """Return the index of a class that is given by its name, else by its index; None if there is none."""
    if text in names:
        return names.index(text)
    return int(text) if text.strip().isdecimal() and int(text) < len(names) else None
