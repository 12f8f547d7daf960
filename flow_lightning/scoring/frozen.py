"""What the frozen pre-trained model makes of samples: found once in a fit, or once for all fits of a board.

In: loaders and functions of a batch. Out: values by sample, and a folder of files. Next: `scoring.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flow_lightning.contract import module_contract
from flow_lightning.distributed import from_rank_zero, on_rank_zero
from flow_lightning.files import load_tensors, save_tensors
from flow_lightning.scoring.evaluation import evaluation
from flow_lightning.scoring.fingerprint import inspect_dataset, join_fingerprints, model_fingerprints, targets_of
from flow_lightning.scoring.samples import cut_batches
from flow_lightning.scoring.score import Block, by_index, score_blocks
from flow_lightning.scoring.store import batches_to_check

_FORMAT = "flow_lightning.Frozen/1"
#: Features above so many bytes are not kept.
_MOST = 2**30


@dataclass
class Frozen:
    """Values that depend on the pre-trained model and the samples alone.

    Attributes:
        trainer: Runs the fit.
        module: The model.
        folder: Where files are that other fits made or will read, written atomically; None for no files.
        keeps_features: Whether features stay in memory for the whole fit, as answers do.
    """

    trainer: Trainer
    module: LightningModule
    folder: Path | None = None
    keeps_features: bool = False
    _known: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def features(self, name: str, loader: DataLoader[Any], says: str) -> tuple[Tensor, Tensor] | None:
        """Return the features of all samples, `[n, D]` float32, and the targets that the data set lists now, `[n]`.

        None if the module declares no features, there are too many, or the samples have other targets than those.
        """
        contract, listed = module_contract(self.module), targets_of(loader.dataset)
        head, in_shards = contract.head, self.trainer.strategy.restore_checkpoint_after_setup
        if contract.features is None or not isinstance(head, nn.Linear) or listed is None or in_shards:
            return None
        if 4 * len(listed) * head.in_features > _MOST:
            return None
        data = _Unlabelled(loader, torch.as_tensor(listed).long())
        new = tuple(f"{key}." for key, part in self.module.named_modules() if part is head)
        (features,) = self.values(name, loader, partial(_features, self.module), says, data, new)
        return (features, data.labels) if data.agrees else None

    def values(
        self, name: str, loader: DataLoader[Any], of_batch: Any, says: str, data: Any = None, new: tuple[str, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Return what a function of a batch gives for all samples, `[n, ...]` each, the same on every rank.

        Args:
            name: Of the file in the folder, without `.safetensors`.
            loader: Reads the samples.
            of_batch: A partial function.
            says: What the progress bar says.
            data: What is known of the samples, if that is not all of them.
            new: Prefixes of parameters that have no part in it.
        """
        batches = cut_batches(loader)
        run = partial(score_blocks, self.trainer, self.module, loader, function=of_batch, description=says)
        with evaluation(self.module):
            samples, is_random = inspect_dataset(loader.dataset if data is None else data)
        model = join_fingerprints(model_fingerprints(self.module.state_dict()), new)
        how = f"{of_batch.func.__name__}, {self.trainer.precision}, {self.module.device.type}, {len(batches[0])}"
        key = {"the data set": samples, "the pre-trained model": model, "precision, device or batch size": how}
        if str(key) in self._known:
            return self._known[str(key)]
        file = None if self.folder is None or is_random else self.folder / f"{name}.safetensors"
        values = None if file is None else self._from_file(file, key, batches, run)
        if values is None:
            values = by_index(run(batches), sum(map(len, batches)))
            if file is not None:
                tensors = {f"value{number}": value for number, value in enumerate(values)}
                on_rank_zero(self.trainer, partial(save_tensors, file, _FORMAT, tensors, key))
        if not is_random and (self.keeps_features or not new):
            self._known[str(key)] = values
        return values

    def _from_file(
        self, file: Path, key: dict[str, str], batches: Sequence[Sequence[int]], run: Callable[[Any], Iterator[Block]]
    ) -> tuple[Tensor, ...] | None:
        """Return the values of a file if it is still true, after computing a few anew: first, last, some between."""
        found: Any = from_rank_zero(self.trainer, lambda: _read(file, key))
        if isinstance(found, tuple):
            (block,) = run([[i for (i,) in batches_to_check([[i] for batch in batches for i in batch])]])
            index, *now = block.values
            why = next(filter(None, (_difference(index, old[index], new) for old, new in zip(found, now))), "")
            if not why:
                rank_zero_info(f"{file} is still true: {len(found[0])} samples need no pass of the pre-trained model.")
                return found
            found = f"it is no longer true ({why})"
        if found:
            rank_zero_warn(f"{file} is not used: {found}. It is made anew.")
        return None


class _Unlabelled:
    """Samples without their targets; `agrees` says whether those that were read have the labels `[n]` as target."""

    def __init__(self, loader: DataLoader[Any], labels: Tensor) -> None:
        self.data, self.collate, self.labels, self.agrees = loader.dataset, loader.collate_fn, labels, True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Any:
        batch: Any = self.collate([self.data[position]])
        given = batch.get("target") if isinstance(batch, Mapping) else None
        self.agrees &= isinstance(given, Tensor) and given.tolist() == [int(self.labels[position])]
        return {name: value for name, value in batch.items() if name != "target"} if self.agrees else batch


def _features(module: Any, batch: Any) -> tuple[Tensor]:
    return (module.features(batch).float(),)


def _difference(index: Tensor, before: Tensor, now: Tensor) -> str:
    """Say which sample differs: by a thousandth of its length, or of classes at all. Batches of other sizes round."""
    old, new = (value.double().reshape(len(index), -1) for value in (before, now))
    bound = (1e-3 if now.is_floating_point() else 0.0) * old.norm(dim=1)
    is_far = torch.tensor([True]) if old.shape != new.shape else ~((new - old).norm(dim=1) <= bound)
    return f"sample {int(index[is_far.nonzero()[0]])} has other values now" if is_far.any() else ""


def _read(file: Path, key: dict[str, str]) -> tuple[Tensor, ...] | str:
    """Return the values in a file, or why they cannot be used: nothing if there is no file."""
    if not file.exists():
        return ""
    try:
        tensors, metadata = load_tensors(file, _FORMAT)
    except ValueError as error:
        return str(error)
    changed = [what for what, value in key.items() if metadata.get(what) != value]
    return f"{' and '.join(changed)} changed since" if changed else tuple(tensors[name] for name in sorted(tensors))
