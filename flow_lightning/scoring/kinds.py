"""What is computed of each batch of training samples: losses of samples, losses of tokens, or features for a probe.

In: module and batch. Out: values by batch, and what becomes of all of them. Next: `scoring.py`.
"""

import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from tqdm.auto import tqdm

from flow_lightning.distributed import from_rank_zero
from flow_lightning.files import save_array
from flow_lightning.method.flow import check_losses
from flow_lightning.method.matching import belongs, swap_prompts
from flow_lightning.method.probe import STRENGTHS, fit_probe
from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.scoring.samples import Samples
from flow_lightning.scoring.score import Block, by_index, ragged_by_index

#: Half of the gains are negative where prompts tell nothing; from this share on a model is not believed.
_CANNOT_TELL = 0.4


class Kind(ABC):
    """One way to score.

    Attributes:
        name: What a file of its results says it holds.
        weights: What the losses become.
        description: What the progress bar says.
        new_parts: Prefixes of parameters that `inspect` has found to be no part of the pre-trained model.
    """

    name: str
    new_parts: tuple[str, ...] = ()
    weights: type[SampleWeights] | type[TokenWeights] = SampleWeights
    description = "FLOW: scoring"

    def inspect(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:  # noqa: B027
        """Learn from a few samples what must be known before scoring, and refuse what cannot be scored."""

    def context(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[Any]:
        """Return the context in which batches are scored."""
        return nullcontext()

    @abstractmethod
    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Compute the values of a batch; the first tensor has one row per sample."""

    @abstractmethod
    def collect(self, trainer: Trainer, module: LightningModule, blocks: Iterable[Block], n: int) -> dict[str, Tensor]:
        """Turn the blocks of all n samples into losses and whatever belongs to them."""

    def rows(self, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return sample and value of each row of a block's values: what is compared when a file is checked."""
        return values[0], values[1]


class SampleLosses(Kind):
    """`module.sample_losses`, or a function of module and batch in its place: `losses` `[n]`."""

    name = "losses of samples"

    def __init__(self, function: Callable[[Any, Any], Tensor] | None = None) -> None:
        self.function = function

    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return the losses, `[B]` float32."""
        losses: Tensor = self.function(module, batch) if self.function else module.sample_losses(batch)  # type: ignore[operator]
        if losses.ndim != 1:
            raise ValueError(
                f"sample_losses(batch) gave shape {tuple(losses.shape)}; expected one loss per sample, [B] "
                "(reduction='none')."
            )
        return (losses.float(),)

    def collect(self, trainer: Trainer, module: LightningModule, blocks: Iterable[Block], n: int) -> dict[str, Tensor]:
        """Return `losses`."""
        (losses,) = by_index(blocks, n)
        check_losses(losses)
        return {"losses": losses}


class MatchedLosses(SampleLosses):
    """A language model's `sample_losses`, and those after other prompts: `losses`, `other_losses` and `right` `[n]`.

    `right` is the probability that the response belongs to its prompt, see `method/matching.py`. `issues` are those
    below 1/2.
    """

    name = "losses of samples after their own prompts and after others"
    description = "FLOW: scoring, with two prompts each"

    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return the losses after the own prompt, and after that of another sample of the batch, `[B]` float32 each."""
        return (*super().values(module, batch), *super().values(module, swap_prompts(batch)))

    def collect(self, trainer: Trainer, module: LightningModule, blocks: Iterable[Block], n: int) -> dict[str, Tensor]:
        """Return `losses` and what is said of them."""
        losses, others = by_index(blocks, n)
        check_losses(losses)
        gains = torch.where(others > 0, others - losses, torch.nan)  # 0: there was no other prompt
        known, negative = int(gains.isfinite().sum()), int((gains < 0).sum())
        if not known:
            raise ValueError(
                "No batch of scoring has two samples with different prompts, so no response can be read after another "
                "prompt. Raise batch_size or tokens_per_batch, or use weighting='flow'."
            )
        right = belongs(gains)
        if negative > _CANNOT_TELL * known:
            rank_zero_warn(
                f"{negative:,} of {known:,} responses are likelier after other prompts, so this model cannot tell "
                "which belong to their prompts. All are taken to belong."
            )
            right = torch.ones(n)
        issues = right < 0.5
        unknown = f" {n - known:,} had no other prompt in their batch." if known < n else ""
        rank_zero_info(f"{int(issues.sum()):,} of {n:,} responses look as if they belong to other prompts.{unknown}")
        return {"losses": losses, "other_losses": others, "right": right, "issues": issues.byte()}


class TokenLosses(Kind):
    """`module.token_losses`: `losses` `[K]` and `offsets` `[n + 1]`."""

    name = "losses of tokens"
    weights = TokenWeights
    description = "FLOW: scoring tokens"

    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return the number of supervised tokens `[B]` and their losses `[K]`."""
        return module.token_counts(batch), module.token_losses(batch)  # type: ignore[operator]

    def collect(self, trainer: Trainer, module: LightningModule, blocks: Iterable[Block], n: int) -> dict[str, Tensor]:
        """Return `losses` and `offsets`."""
        losses, offsets = ragged_by_index(blocks, n)
        check_losses(losses)
        return {"losses": losses, "offsets": offsets}

    def rows(self, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the sample of each token, and its loss."""
        index, counts, losses = values
        return index.repeat_interleave(counts), losses


@dataclass
class ProbeFeatures(Kind):
    """`module.features` and targets, to a linear probe: its tensors (see `Probe.tensors`), `losses` `[n]` among them.

    Attributes:
        classes: C, the number of classes.
        folds: 0 for the probe's losses on its own training samples, as in the paper; k > 1 for k-fold out-of-fold ones.
        memory_budget: Features above this many GiB go to a memory-mapped temporary file.
        sample_weights: Weights of the samples in the probe's own loss, `[n]`; by default all 1.
        head: The layer that the probe is for.
        rounds: See `fit_probe`.
        corrected: See `fit_probe`.
        keeps_features: Whether `found` keeps the features and targets of all samples, on rank 0, until they are taken.
        arrays: A folder that gets `pred_probs.npy` and `features.npy`, with folds, once the probe is solved; then None.
    """

    classes: int
    folds: int = 0
    memory_budget: float = 4.0
    description: str = "Linear probe"
    rounds: int = 1
    sample_weights: Tensor | None = None
    head: nn.Linear | None = None
    corrected: bool = False
    arrays: Path | None = None
    keeps_features: bool = False
    found: tuple[Tensor, ...] | None = field(default=None, init=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name the probe with what its result depends on."""
        rounds = f", rounds {self.rounds}" * (self.rounds > 1)
        return f"linear probe, {self.classes} classes, folds {self.folds}{rounds}"

    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return features `[B, D]` float32 and targets `[B]`."""
        if "target" not in batch:
            raise KeyError(f"A training batch has no 'target' (keys {sorted(batch)}): the probe cannot be fitted.")
        return module.features(batch).float(), batch["target"]  # type: ignore[operator]

    def rows(self, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return features and target of each sample: a changed label counts, too."""
        index, features, targets = values
        return index, torch.cat([features.flatten(1), targets[:, None].to(features.dtype)], dim=1)

    def collect(self, trainer: Trainer, module: LightningModule, blocks: Iterable[Block], n: int) -> dict[str, Tensor]:
        """Collect the features on rank 0, solve there, and hand the solution to every rank."""
        with tempfile.TemporaryDirectory(prefix="flow_features_") as folder:
            allocate = allocator(self.memory_budget, Path(folder))
            found = by_index(blocks, n, allocate, wanted=trainer.is_global_zero)
            self.found = found if self.keeps_features else None
            return self.solved(trainer, module, found)

    def solved(self, trainer: Trainer, module: LightningModule, found: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Solve on features and targets that rank 0 has found, and hand the solution to every rank."""
        solve = partial(self._solve, found, module.device, trainer.progress_bar_callback is None)
        return from_rank_zero(trainer, solve)

    def _solve(self, found: tuple[Tensor, ...], device: torch.device, quiet: bool) -> dict[str, Tensor]:
        features, targets = found
        steps = self.rounds * (len(STRENGTHS) + self.folds + 1) + self.corrected * (len(STRENGTHS) + 1)
        with tqdm(total=steps, desc=f"{self.description}: solving", unit="fit", leave=False, disable=quiet) as bar:
            given: Any = {"weights": self.sample_weights, "rounds": self.rounds, "corrected": self.corrected}
            probe = fit_probe(features, targets, self.classes, self.folds, device=device, on_step=bar.update, **given)
        if self.arrays is not None and probe.probabilities is not None:
            for name, values in {"pred_probs": probe.probabilities, "features": features}.items():
                save_array(self.arrays / f"{name}.npy", values)
                size = values.numel() * values.element_size() / 2**20
                rank_zero_info(f"{self.arrays / name}.npy: {' x '.join(map(str, values.shape))}, {size:,.1f} MiB")
            self.arrays = None
        return probe.tensors()


def allocator(budget: float, folder: Path) -> Callable[..., Tensor]:
    """Return a maker of zero-filled tensors: in memory up to the budget in GiB, above it in a memory-mapped file."""

    def allocate(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(size)
        if count * dtype.itemsize <= budget * 2**30:
            return torch.zeros(size, dtype=dtype)
        path = _file_of_zeros(folder, count * dtype.itemsize)
        return torch.from_file(path, shared=True, size=count, dtype=dtype).view(size)

    return allocate


def _file_of_zeros(folder: Path, size: int) -> str:
    """Make a file whose space on the disk is taken at once: a memory-mapped file that finds none ends the process."""
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.truncate(handle, size)
    except OSError as error:
        raise OSError(
            f"The features of the training samples take {size / 2**30:.1f} GiB, and {folder.parent} cannot take them "
            f"({error}). Set TMPDIR to a folder with room, or raise memory_budget to keep them in memory."
        ) from error
    finally:
        os.close(handle)
    return name
