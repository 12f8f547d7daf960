"""A person's decisions about training samples: a CSV or Parquet file that drops samples and corrects labels.

In: `label_issues.csv` of a run with a column `action`. Out: the samples to train on. Next: `images.py`.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SubsetRandomSampler

from flow_lightning.data.indexing import IndexedDataset, check_map_style
from flow_lightning.data.sources import LabelledImages
from flow_lightning.lightning_internals import isolate_rng, own_sampler
from flow_lightning.optional import optional_import
from flow_lightning.scoring.fingerprint import sample_fingerprint, targets_of

_LABELS = ("target", "targets", "label", "labels")  # keys of a sample that is a dict


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

    def of_images(self, images: LabelledImages) -> LabelledImages:
        """Return the images to train on, with their new labels."""
        chosen = ((position, *images.samples[position]) for position in self.kept)
        return LabelledImages(((image, self.labels.get(p, label)) for p, image, label in chosen), images.read)


def read_edits(file: str | Path, targets: Sequence[int], class_names: Sequence[str] | None = None) -> Edits:
    """Read what is to become of samples with given labels.

    The file has the columns `index` and `action`, and may have others. `index` is the position of a sample in the
    training set of the run that wrote `label_issues.csv`. `action` is `keep` or nothing, `drop`, or the new label: the
    name of a class, else its index. The columns `given_label` and `fingerprint`, if there, have to agree with the
    labels of the data set. Samples without a row are kept.

    Args:
        file: A CSV file in UTF-8, with commas; one that ends in `.parquet` is read with pyarrow.
        targets: Class indices of the samples, `[n]`.
        class_names: Names of the classes by index; by default labels are indices up to the largest target.

    Raises:
        ValueError: If the file does not fit the samples; the message names the first row that does not.
    """
    names = [str(name) for name in class_names or range(max(targets, default=-1) + 1)]
    dropped, labels, seen, fingerprint = set(), {}, set(), labels_fingerprint(targets)
    for where, row in _rows(file):
        index = _index(row["index"], len(targets), where)
        if index in seen:
            raise ValueError(f"{where}: sample {index} has two rows. Leave one of them.")
        seen.add(index)
        if row.get("fingerprint", fingerprint) != fingerprint:
            raise ValueError(
                f"{where}: the fingerprint is {row['fingerprint']!r}, that of the labels here is {fingerprint!r}. The "
                "file was made for other data, for another split of them, or before earlier edits."
            )
        given, action = row.get("given_label", str(targets[index])), (row["action"] or "").strip()
        if "given_label" in row and _class_of(given or "", names) != targets[index]:
            raise ValueError(
                f"{where}: given_label of sample {index} is {given!r}, in the data set it is "
                f"{names[targets[index]]!r}. The file was made for other data, or for another split of them."
            )
        if action == "drop":
            dropped.add(index)
        elif action not in ("", "keep"):
            label = _class_of(action, names)
            if label is None:
                raise ValueError(
                    f"{where}: action {action!r} of sample {index} is neither keep, drop nor a class. Classes are "
                    f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}, or their indices."
                )
            if label != targets[index]:
                labels[index] = label
    if len(dropped) == len(targets):
        raise ValueError(f"{file} drops all {len(targets)} samples, so nothing is left to train on.")
    return Edits([index for index in range(len(targets)) if index not in dropped], labels, len(targets))


def labels_fingerprint(targets: Sequence[int]) -> str:
    """Return a hash of all labels of a data set, in order. It starts with a letter, so a spreadsheet leaves it alone.

    >>> labels_fingerprint([0, 1, 2]) == labels_fingerprint([0, 1, 2]) != labels_fingerprint([0, 2, 1])
    True
    """
    return f"labels-{sample_fingerprint(np.asarray(targets, dtype=np.int64))[:16]}"


def apply_edits(dataset: Any, file: str | Path, class_names: Sequence[str] | None = None) -> "EditedDataset":
    """Return a data set without the samples that a person dropped, and with the labels that they corrected.

    Apply it to the training set of the run that wrote `label_issues.csv`, before `IndexedDataset`. If the data set
    lists no `targets`, its samples are read once to find the labels. `metrics.json` of a fit with it has the numbers.

    Args:
        dataset: A map-style data set of pairs `(x, class index)`, or of dicts with one of the keys `target`, `targets`,
            `label` and `labels`.
        file: See `read_edits`.
        class_names: Names of the classes by index; by default the data set's `classes`, as torchvision has them.

    Raises:
        TypeError: If the labels of the samples cannot be found, or are no class indices.
        ValueError: If the file does not fit the samples.
    """
    if isinstance(dataset, IndexedDataset):
        raise TypeError("Samples are numbered anew after edits: use IndexedDataset(apply_edits(dataset, file)).")
    return EditedDataset(dataset, *_edits_of(dataset, file, class_names))


def _edits_of(dataset: Any, file: str | Path, class_names: Sequence[str] | None) -> tuple[Edits, list[int]]:
    """Return edits and labels of a data set."""
    check_map_style(dataset)
    targets = targets_of(dataset)
    if targets is None:
        with isolate_rng():  # random transforms may draw numbers
            targets = [_label(dataset[position])[1] for position in range(len(dataset))]
    found = np.asarray(targets)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise TypeError(f"Labels to edit are class indices; the data set has {found.dtype} of shape {found.shape}.")
    names = getattr(dataset, "classes", None) if class_names is None else class_names
    return read_edits(file, found.tolist(), names), found.tolist()


class KeptSampler(SubsetRandomSampler):
    """Draw the samples that a person did not drop, in random order, for `DataLoader(dataset, sampler=...)`.

    The data set and the positions of its samples stay as they are, so weights that it has keep their samples. What
    reads the whole data set, such as scoring, still sees the dropped ones; `apply_edits` leaves them out everywhere.

    Args:
        dataset: See `apply_edits`; an `IndexedDataset` may be around it.
        file: See `read_edits`.
        class_names: See `apply_edits`.
        generator: Source of the order; by default torch's own.

    Raises:
        TypeError: If the labels of the samples cannot be found, or are no class indices.
        ValueError: If the file does not fit the samples, or corrects labels, which no sampler can.
    """

    def __init__(
        self,
        dataset: Any,
        file: str | Path,
        class_names: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        inner = dataset.dataset if isinstance(dataset, IndexedDataset) else dataset
        self.edits, _ = _edits_of(inner, file, class_names)
        if self.edits.labels:
            raise ValueError(
                f"{file} gives {len(self.edits.labels)} samples a new label, which a sampler cannot. Use "
                "flow_lightning.apply_edits(dataset, file) as the data set."
            )
        super().__init__(self.edits.kept, generator)


def edit_numbers(loader: Any) -> dict[str, int]:
    """Return how many samples of a loader were dropped and relabelled; nothing if it knows of no edits."""
    if isinstance(sampler := own_sampler(loader), KeptSampler):
        return sampler.edits.numbers
    part: Any = getattr(loader, "dataset", None)
    while part is not None:
        if isinstance(part, EditedDataset):
            return part.edits.numbers
        part = getattr(part, "dataset", None)
    return {}


class EditedDataset(Dataset[Any]):
    """Some samples of a data set, some of them with another label; `targets` has the labels, `[n]`."""

    def __init__(self, dataset: Any, edits: Edits, targets: Sequence[int]) -> None:
        self.source, self.edits = dataset, edits
        self.targets = [edits.labels.get(position, targets[position]) for position in edits.kept]

    def __len__(self) -> int:
        return len(self.edits.kept)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a data set whose transforms depend on it."""
        if callable(of_dataset := getattr(self.source, "set_epoch", None)):
            of_dataset(epoch)

    def __getitem__(self, index: int) -> Any:
        position = self.edits.kept[index]
        sample = self.source[position]
        if position not in self.edits.labels:
            return sample
        key, old = _label(sample)
        new = self.edits.labels[position]
        label = torch.as_tensor(new, dtype=old.dtype) if isinstance(old, torch.Tensor) else type(old)(new)
        if isinstance(sample, Mapping):
            return {**sample, key: label}
        return type(sample)(*sample[:-1], label) if hasattr(sample, "_fields") else type(sample)([*sample[:-1], label])


def _label(sample: Any) -> tuple[Any, Any]:
    """Return where the label of a sample is, and the label."""
    if isinstance(sample, Mapping):
        if len(keys := [key for key in _LABELS if key in sample]) == 1:
            return keys[0], sample[keys[0]]
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        return 1, sample[1]
    raise TypeError(
        f"The label of a sample ({type(sample).__name__}) cannot be found. Expected a pair (x, class index), or a dict "
        f"with one of the keys {', '.join(_LABELS)}."
    )


def columns_of(file: str | Path) -> list[str]:
    """Return the names of the columns of a CSV or Parquet file."""
    if Path(file).suffix == ".parquet":
        return list(_parquet().read_schema(file).names)
    with open(file, newline="", encoding="utf-8-sig") as lines:  # spreadsheets begin a file with a mark
        return next(csv.reader(lines), [])


def _rows(file: str | Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Read the rows of a file, each with its place."""
    columns = columns_of(file)
    if missing := [name for name in ("index", "action") if name not in columns]:
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
