"""One sweep over a data set under a Trainer: the only place where scoring meets devices, precision and ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.indexing import batch_index
from flow_lightning.scoring import FixedBatches, collect, evaluation, loader_like, progress, share_of_rank
from flow_lightning.token_weighting import token_positions

_HOW = (
    "Give the Trainer a data module (or a module) with `scoring_dataloader()`, which returns the training samples with "
    "deterministic transforms, or with `train_dataloader()`; or pass FlowWeightingCallback(dataloader=...)."
)


def sweep(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    function: Callable[[Any], tuple[Tensor, ...]],
    description: str,
    allocate: Callable[..., Tensor] = torch.zeros,
) -> tuple[Tensor, ...]:
    """Apply a function of a batch to every sample of a loader's data set, once, in evaluation mode, over all ranks.

    Rank r takes samples (or fixed batches) r, r + world, r + 2 world, ...: none twice, none padded. The bare module is
    called, not the wrapped one, whose forward would wait for ranks that have no batch left.

    Args:
        trainer: Gives devices, precision and ranks.
        module: Is put into evaluation mode meanwhile.
        loader: Where the data set, its collate function, batch size and workers come from; it is not iterated.
        function: Maps a batch on the device to tensors `[B, ...]`.
        description: What the progress bar says.
        allocate: Makes the tensors for the results, see `collect`.

    Returns:
        For each tensor of the function one `[n, ...]` tensor on the CPU, by sample index, the same on every rank.
    """
    length = len(loader.dataset)  # type: ignore[arg-type]
    share = share_of_rank(loader, trainer.global_rank, trainer.world_size)
    indices = list(chain.from_iterable(share)) if isinstance(share, FixedBatches) else share
    mine = loader_like(loader, share)
    show = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with evaluation(module), _evaluation_stage(trainer):
        batches = progress(on_device(trainer, module, mine), len(mine), description, show)
        results = collect(batches, lambda batch: _in_precision(trainer, function, batch), indices, allocate, length)
    return _joined(trainer, results, length, allocate)


def ragged_sweep(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    function: Callable[[Any], tuple[Tensor, Tensor]],
    description: str,
) -> tuple[Tensor, Tensor]:
    """Do the same as `sweep` for a function that gives each sample several values, not all the same number.

    Args:
        trainer: See `sweep`.
        module: See `sweep`.
        loader: See `sweep`.
        function: Maps a batch to its values `[K]`, sample by sample, and to the number of values of each sample, `[B]`.
        description: See `sweep`.

    Returns:
        Values of all samples `[K]`, by sample index, and offsets `[n + 1]`: sample i has `offsets[i]` to
        `offsets[i + 1]`. The same on every rank.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def counted(batch: Any) -> tuple[Tensor]:
        values, counts = function(batch)
        kept.append((batch_index(batch).cpu(), values.cpu()))
        return (counts,)

    (counts,) = sweep(trainer, module, loader, counted, description)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.long().cumsum(0)])
    flat = torch.zeros(int(offsets[-1]))
    for index, values in kept:
        flat[token_positions(offsets, index)] = values.to(flat.dtype)
    return _joined(trainer, (flat,), len(flat), torch.zeros)[0], offsets


def on_device(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader as the Trainer would: through the transfer hooks, on the device."""
    hooks = [owner for owner in (trainer.datamodule, module) if owner is not None]  # type: ignore[attr-defined]
    for batch in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        for owner in hooks:
            batch = owner.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch)


def scoring_dataloader(trainer: Trainer, module: LightningModule) -> DataLoader[Any]:
    """Find the training samples to score: `scoring_dataloader()` of data module or module, else `train_dataloader()`.

    Raises:
        TypeError: If there is neither, or it does not return a DataLoader.
    """
    owners: list[Any] = [owner for owner in (trainer.datamodule, module) if owner is not None]  # type: ignore[attr-defined]
    for owner in owners:
        if callable(getattr(owner, "scoring_dataloader", None)):
            return _checked(owner.scoring_dataloader(), owner, "scoring_dataloader")
    for owner in owners:
        if is_overridden("train_dataloader", owner):
            return _checked(owner.train_dataloader(), owner, "train_dataloader")
    raise TypeError(f"FLOW needs the training samples at on_fit_start and finds none. {_HOW}")


def _checked(loader: Any, owner: Any, name: str) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"{type(owner).__name__}.{name}() gave a {type(loader).__name__}; expected a DataLoader. {_HOW}"
        )
    return loader


def _in_precision(trainer: Trainer, function: Callable[[Any], tuple[Tensor, ...]], batch: Any) -> tuple[Tensor, ...]:
    with trainer.precision_plugin.forward_context():
        return function(batch)


@contextmanager
def _evaluation_stage(trainer: Trainer) -> Iterator[None]:
    """Let hooks that augment `if self.trainer.training` see that this is no training."""
    before = trainer.training
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = before


def _joined(
    trainer: Trainer, results: tuple[Tensor, ...], length: int, allocate: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """Add up the ranks' results, which are 0 wherever another rank has the sample."""
    if trainer.world_size == 1:
        return results
    # A rank without a single sample has not seen the shapes: rank 0, which always has one, tells.
    shapes = trainer.strategy.broadcast([(tuple(result.shape), result.dtype) for result in results])
    results = results or tuple(allocate(shape, dtype=dtype) for shape, dtype in shapes)
    for result in results:
        for rows in result.split(max(1, 2**24 // max(1, result[0].numel()))):
            rows.copy_(trainer.strategy.reduce(rows.to(trainer.strategy.root_device), reduce_op="sum"))
    return results


def run_directory(trainer: Trainer) -> Path:
    """Return the directory of this run: the logger's, or `default_root_dir` without a logger.

    To be called on every rank: rank 0 tells the others.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def forget_older_metrics(trainer: Trainer) -> None:
    """Remove the `metrics.json` that an older run left in this run's directory; to be called in `setup`, on every rank.

    Callbacks add their numbers to that file one by one, so numbers of an older run would stay among them.
    """
    file = run_directory(trainer) / "metrics.json"
    if trainer.is_global_zero:
        file.unlink(missing_ok=True)


def is_trained(checkpoint: dict[str, Any]) -> bool:
    """Tell whether the model in a checkpoint has been trained, so that it is no longer the pre-trained one.

    Tuners save and load a checkpoint of step 0, and leave its path in `trainer.ckpt_path`: that is no resumed fit.
    """
    return bool(checkpoint.get("global_step", 0) > 0)
