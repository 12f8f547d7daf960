"""The file of a scoring, and the blocks beside it while the scoring runs.

In: a path and tensors. Out: what an earlier run has left, if it is still true. Next: `scoring.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from flow_lightning.files import load_tensors, remove, save_tensors
from flow_lightning.scoring.kinds import Kind
from flow_lightning.scoring.score import Block

#: Sample of each row `[m]`, and its values `[m, ...]`: one row per loss, or per sample's features.
Rows = tuple[Tensor, Tensor]
#: What a fingerprint has, and what to call it.
PARTS = {"dataset": "the training data set (its samples, targets or transforms)", "reference": "the pre-trained model"}
_FORMAT = "flow_lightning.ScoringBlock/1"
#: Batches that are scored anew before a file is believed: the first, the last, and some between.
_CHECKED = 8
#: How far a value scored anew may be from the one in the file, relative to it and to the typical value.
_TOLERANCE = 1e-3


class BlockStore:
    """Finished blocks of a scoring, in a folder beside the file that is to come. Only rank 0 reads and writes.

    All files are written atomically, so a killed run leaves blocks that are whole.

    Args:
        file: The file that the scoring is for; the blocks are in `<file>.blocks`.
        key: What the values depend on, as far as it is known: blocks with another key are not used.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.folder = file.with_name(f"{file.name}.blocks")
        self.key = key

    def add(self, start: int, block: Block) -> None:
        """Write the values of batches `start` to `block.end`; a block with NaN or infinity is left out."""
        if not all(torch.isfinite(value).all() for value in block.values):
            return
        tensors = {f"value{i}": value for i, value in enumerate(block.values)} | {"end": torch.tensor(block.end)}
        path = self._path(start)
        try:
            save_tensors(path, _FORMAT, tensors, {"key": self.key})
        except OSError as error:
            raise OSError(f"Cannot write {path.absolute()} ({error}). Make room, or choose another file.") from error

    def blocks(self, batches: Sequence[Sequence[int]]) -> Iterator[Block]:
        """Yield what an interrupted scoring has left, from the first batch on.

        Blocks that are damaged, or of another data set or model, count as absent.
        """
        done = 0
        while (path := self._path(done)).exists():
            try:
                tensors, metadata = load_tensors(path, _FORMAT)
            except ValueError:
                return
            end = int(tensors.pop("end", torch.tensor(-1)))
            values = tuple(tensors[name] for name in sorted(tensors))
            samples = torch.tensor(list(chain.from_iterable(batches[done:end])))
            if metadata != {"key": self.key} or not done < end <= len(batches):
                return
            if not torch.equal(values[0].sort()[0], samples.sort()[0]):
                return
            done = end
            yield Block(done, values)

    def clear(self) -> None:
        """Remove all blocks."""
        remove(self.folder)

    def _path(self, start: int) -> Path:
        return self.folder / f"block-{start:010d}.safetensors"


def batches_to_check(batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Choose the first batch, the last, and some evenly spaced between.

    Example:
        >>> batches_to_check([[0, 1], [2, 3], [4]])
        [[0, 1], [2, 3], [4]]
    """
    last = len(batches) - 1
    count = min(_CHECKED, len(batches))
    return [batches[round(i * last / max(1, count - 1))] for i in range(count)]


def rows_of(kind: Kind, blocks: Iterable[Block], wanted: Tensor | None = None) -> Rows:
    """Join the rows of blocks, in the order of the samples, so that the number of ranks does not show.

    Args:
        kind: Says what a row is.
        blocks: What `score_blocks` yields.
        wanted: Samples whose rows are taken; by default all.
    """
    index, values = map(torch.cat, zip(*(kind.rows(block.values) for block in blocks)))
    if wanted is not None:
        here = torch.isin(index, wanted)
        index, values = index[here], values[here]
    order = index.argsort(stable=True)
    return index[order], values[order]


def first_difference(before: Rows, now: Rows) -> str:
    """Compare rows from a file with the same ones computed anew.

    Returns:
        Which sample differs most, and both numbers; nothing if all agree within a thousandth.

    Example:
        >>> index = torch.tensor([3, 5])
        >>> first_difference((index, torch.tensor([0.5, 1.0])), (index, torch.tensor([0.5, 2.0])))
        'sample 5: 2 now, 1 in the file'
    """
    (index, old), (now_index, new) = before, now
    if not torch.equal(index, now_index) or old.shape != new.shape:
        return f"{list(new.shape)} values now, {list(old.shape)} in the file"
    old, new = old.double().reshape(len(index), -1), new.double().reshape(len(index), -1)
    excess = (new - old).abs() - _TOLERANCE * (old.abs() + old.abs().median())
    row, column = divmod(int(excess.nan_to_num(torch.inf).argmax()), excess.shape[1])
    if excess[row, column] <= 0:
        return ""
    return f"sample {int(index[row])}: {new[row, column]:.4g} now, {old[row, column]:.4g} in the file"


def read_file(path: Path, kind: Kind, fingerprint: dict[str, str]) -> tuple[dict[str, Tensor], Rows] | str | None:
    """Read the result of a scoring from a weights file.

    Returns:
        The result and the rows to check; or why the file cannot be used; or None if there is no file.
    """
    if not path.exists():
        return None
    try:
        weights = kind.weights.load(path)
        tensors, metadata = load_tensors(path, kind.weights.file_format)
    except ValueError as error:
        return str(error)
    changed = [what for key, what in PARTS.items() if weights.fingerprint.get(key) != fingerprint[key]]
    if changed:
        return f"{' and '.join(changed)} changed since it was written"
    if metadata["scored"] != kind.name or "checked/index" not in tensors:
        return f"it holds {metadata['scored'] or 'weights alone'}, not {kind.name}"
    result = {name.removeprefix("result/"): value for name, value in tensors.items() if name.startswith("result/")}
    result |= {name: tensors[name] for name in ("losses", "offsets") if name in tensors}
    return result, (tensors["checked/index"], tensors["checked/values"])
