"""Data sets and samplers of your own with a person's decisions in them.

In: a map-style data set, and a file of `edits.py`. Out: the same without some samples, or with other labels.
Next: `indexing.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SubsetRandomSampler

from flow_lightning.data.edits import Edits, read_edits
from flow_lightning.data.indexing import IndexedDataset, check_map_style
from flow_lightning.lightning_internals import isolate_rng, own_sampler
from flow_lightning.scoring.fingerprint import targets_of

_LABELS = ("target", "targets", "label", "labels")  # keys of a sample that is a dict


def apply_edits(
    dataset: Any, file: str | Path, class_names: Sequence[str] | None = None, *, drop_issues: bool = False
) -> "EditedDataset":
    """Return a data set without the samples that a person dropped, and with the labels that they corrected.

    Apply it to the training set of the run that wrote `label_issues.csv`, before `IndexedDataset`. If the data set
    lists no `targets`, its samples are read once to find the labels. `metrics.json` of a fit with it has the numbers.

    Args:
        dataset: A map-style data set of pairs `(x, class index)`, or of dicts with one of the keys `target`, `targets`,
            `label` and `labels`.
        file: See `read_edits`.
        class_names: Names of the classes by index; by default the data set's `classes`, as torchvision has them.
        drop_issues: See `read_edits`.

    Raises:
        TypeError: If the labels of the samples cannot be found, or are no class indices.
        ValueError: If the file does not fit the samples.
    """
    if isinstance(dataset, IndexedDataset):
        raise TypeError("Samples are numbered anew after edits: use IndexedDataset(apply_edits(dataset, file)).")
    return EditedDataset(dataset, *_edits_of(dataset, file, class_names, drop_issues))


def _edits_of(
    dataset: Any, file: str | Path, class_names: Sequence[str] | None, drop_issues: bool
) -> tuple[Edits, list[int]]:
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
    return read_edits(file, found.tolist(), names, drop_issues=drop_issues), found.tolist()


class KeptSampler(SubsetRandomSampler):
    """Draw the samples that a person did not drop, in random order, for `DataLoader(dataset, sampler=...)`.

    The data set and the positions of its samples stay as they are, so weights that it has keep their samples. What
    reads the whole data set, such as scoring, still sees the dropped ones; `apply_edits` leaves them out everywhere.

    Args:
        dataset: See `apply_edits`; an `IndexedDataset` may be around it.
        file: See `read_edits`.
        class_names: See `apply_edits`.
        generator: Source of the order; by default torch's own.
        drop_issues: See `read_edits`.

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
        *,
        drop_issues: bool = False,
    ) -> None:
        inner = dataset.dataset if isinstance(dataset, IndexedDataset) else dataset
        self.edits, _ = _edits_of(inner, file, class_names, drop_issues)
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
