"""The new head, fitted on the frozen body before training."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from flow_lightning.callbacks.caching import open_store, remembered
from flow_lightning.callbacks.run_directory import (
    begin_run,
    claim_run,
    from_rank_zero,
    is_trained,
    on_rank_zero,
    release_run,
    run_directory,
)
from flow_lightning.callbacks.sweep import scoring_dataloader, sweep
from flow_lightning.modules.sharding import fill, whole_parameters
from flow_lightning.probing import STRENGTHS, Probe, fit_probe
from flow_lightning.report import write_metrics
from flow_lightning.score_store import ScoreStore


class LinearProbeCallback(Callback):
    """Fit the new head on features of the frozen body, at `on_fit_start` (paper, vision protocol, step 1).

    One pass over the training images serves the head and, if a FlowWeightingCallback follows, temperature and weights.
    The module needs `features(batch) -> [B, D]`, a `head` (`nn.Linear`) and batches with `target`.

    Args:
        folds: 0 weighs samples by the losses of the probe on its own training samples, as the authors do; k > 1 by
            the losses of k probes on the samples that each has not seen, for a probe that over-fits.
        memory_budget: Features above this many GiB go to a memory-mapped temporary file.
        cache: Whether the probe is kept for later fits on the same body and data, or the folder where; see
            FlowWeightingCallback.
        force: Whether to compute it anew and replace what is there.
    """

    def __init__(
        self, folds: int = 0, memory_budget: float = 4.0, cache: bool | str | Path = True, force: bool = False
    ) -> None:
        self.folds = folds
        self.memory_budget = memory_budget
        self.cache = cache
        self.force = force
        self.probe: Probe | None = None
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self.probe, self._resumed = None, False
            claim_run(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a resumed fit, which has its head already."""
        self._resumed |= is_trained(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head; a resumed fit finds the head in its checkpoint."""
        check_probeable(pl_module)
        begin_run(trainer, self._resumed)
        if self._resumed:
            return
        started = time.perf_counter()
        purpose = ("probe", self.folds, pl_module.head.out_features, fit_probe)  # type: ignore[union-attr]
        store = open_store(
            trainer,
            pl_module,
            scoring_dataloader(trainer, pl_module),
            purpose,
            self.cache,
            self.force,
            head_names(pl_module),
        )
        self.probe = fit_head(trainer, pl_module, self.folds, self.memory_budget, "Linear probe", store)
        metrics = {
            "probe/strength": self.probe.strength,
            "probe/mean_loss": float(self.probe.losses.double().mean()),
            "time/probe_s": time.perf_counter() - started,
        }
        file = run_directory(trainer) / "metrics.json"
        on_rank_zero(trainer, lambda: write_metrics(file, metrics))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the run's directory back."""
        release_run(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the run's directory back."""
        release_run(trainer)


def fit_head(
    trainer: Trainer,
    module: LightningModule,
    folds: int,
    budget: float,
    description: str,
    store: ScoreStore | None = None,
) -> Probe:
    """Extract the features of all training samples once, solve the probe on them and put it into the module's head.

    Returns:
        The probe, the same on every rank: rank 0 solves, the others receive.
    """
    found = remembered(trainer, store, description, lambda: _fit(trainer, module, folds, budget, description, store))
    probe = Probe.from_tensors(found)
    with whole_parameters(trainer, module):
        _install(module, probe)
    rank_zero_info(
        f"{description}: {len(probe.losses)} samples, L2 strength {probe.strength:.3g}, "
        f"mean {'out-of-fold' if folds else 'training'} loss {probe.losses.mean():.4f}."
    )
    return probe


def head_names(module: LightningModule) -> tuple[str, ...]:
    """Return the prefixes of the head's parameters."""
    head = getattr(module, "head", None)
    return tuple(f"{name}." for name, submodule in module.named_modules() if submodule is head)


def _fit(
    trainer: Trainer, module: LightningModule, folds: int, budget: float, description: str, store: ScoreStore | None
) -> dict[str, Tensor]:
    def look(batch: Any) -> tuple[Tensor, Tensor]:
        return module.features(batch).float(), _targets(batch)  # type: ignore[operator]

    with tempfile.TemporaryDirectory(prefix="flow_features_") as folder:
        loader, allocate = scoring_dataloader(trainer, module), _allocator(budget, Path(folder))
        found = sweep(trainer, module, loader, look, f"{description}: features", allocate, store, everywhere=False)
        quiet, classes = trainer.progress_bar_callback is None, module.head.out_features  # type: ignore[union-attr]

        def solve() -> dict[str, Tensor]:
            steps = len(STRENGTHS) + folds + 1
            with tqdm(total=steps, desc=f"{description}: solving", unit="fit", leave=False, disable=quiet) as bar:
                features, targets = found
                return fit_probe(features, targets, classes, folds, device=module.device, on_step=bar.update).tensors()  # type: ignore[arg-type]

        return from_rank_zero(trainer, solve)


def check_probeable(module: LightningModule) -> None:
    """Refuse a module without `features` and `head`.

    Raises:
        TypeError: The message says what is missing.
    """
    if not callable(getattr(module, "features", None)) or not isinstance(
        getattr(module, "head", None), torch.nn.Linear
    ):
        raise TypeError(
            f"{type(module).__name__} cannot be probed: it needs features(batch) -> [B, D] and a head (nn.Linear), as "
            "ImageClassificationModule has. Without a new head "
            "neither probe nor refit is needed: leave LinearProbeCallback and HeadRefitCallback out."
        )


def _targets(batch: Any) -> Tensor:
    if "target" not in batch:
        raise KeyError(
            f"A batch of the training data has no 'target' (keys {sorted(batch)}): the probe cannot be fitted."
        )
    return batch["target"]  # type: ignore[no-any-return]


def _install(module: LightningModule, probe: Probe) -> None:
    head: torch.nn.Linear = module.head  # type: ignore[assignment]
    fill(head.weight, probe.head.weight)
    if head.bias is None:
        raise TypeError("The head has no bias, which the probe fits too. Give the model a head with bias=True.")
    fill(head.bias, probe.head.bias)


def _allocator(budget: float, folder: Path) -> Callable[..., Tensor]:
    """Return a maker of zero-filled tensors: in memory up to the budget in GiB, above it in a memory-mapped file."""

    def allocate(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(size)
        if count * dtype.itemsize <= budget * 2**30:
            return torch.zeros(size, dtype=dtype)
        return torch.from_file(_file_of(folder, count * dtype.itemsize), shared=True, size=count, dtype=dtype).view(
            size
        )

    return allocate


def _file_of(folder: Path, size: int) -> str:
    """Make a file of zeros whose room on the disk is taken at once: a memory-mapped file that finds none is fatal."""
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
