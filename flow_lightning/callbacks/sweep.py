"""One sweep over a data set under a Trainer: the only place where scoring meets devices, precision and ranks."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.callbacks.run_directory import from_rank_zero, on_rank_zero
from flow_lightning.modules.sharding import data_rank, drop_gathered, in_wrapper
from flow_lightning.score_store import ScoreStore
from flow_lightning.scoring import evaluation, loader_like, progress, score_batch, scoring_batches
from flow_lightning.token_weighting import token_positions

#: What is lost at most when scoring is killed.
_SECONDS_PER_BLOCK = 10.0
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
    store: ScoreStore | None = None,
    everywhere: bool = True,
) -> tuple[Tensor, ...]:
    """Apply a function of a batch to every sample of a loader's data set, once, in evaluation mode, over all ranks.

    Rank r takes batches r, r + world, r + 2 world, ...: none twice, none padded. The bare module is called, not the
    wrapped one, whose forward would wait for ranks that have no batch left.

    Args:
        trainer: Gives devices, precision and ranks.
        module: Is put into evaluation mode meanwhile.
        loader: Where the data set, its collate function, batch size and workers come from; it is not iterated.
        function: Maps a batch on the device to tensors `[B, ...]`.
        description: What the progress bar says.
        allocate: Makes the tensors for the results, called with `size, dtype=`.
        store: Where finished batches are written to, and those of an interrupted sweep are found.
        everywhere: Whether every rank needs the results, or rank 0 alone, which saves the others the memory.

    Returns:
        For each tensor of the function one `[n, ...]` tensor on the CPU, by sample index, the same on every rank; none
        on ranks that need none.
    """
    length = len(loader.dataset)  # type: ignore[arg-type]
    results: tuple[Tensor, ...] = ()
    for index, *values in _blocks(trainer, module, loader, function, description, store):
        if not (everywhere or trainer.is_global_zero):
            continue
        results = results or tuple(allocate((length, *value.shape[1:]), dtype=value.dtype) for value in values)
        for result, value in zip(results, values):
            result[index] = value
    return results


def ragged_sweep(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    function: Callable[[Any], tuple[Tensor, Tensor]],
    description: str,
    store: ScoreStore | None = None,
) -> tuple[Tensor, Tensor]:
    """Do the same as `sweep` for a function that gives each sample several values, not all the same number.

    Args:
        trainer: See `sweep`.
        module: See `sweep`.
        loader: See `sweep`.
        function: Maps a batch to the number of values of each sample, `[B]`, and the values `[K]`, sample by sample.
        description: See `sweep`.
        store: See `sweep`.

    Returns:
        Values of all samples `[K]`, by sample index, and offsets `[n + 1]`: sample i has `offsets[i]` to
        `offsets[i + 1]`. The same on every rank.
    """
    index, counts, values = map(torch.cat, zip(*_blocks(trainer, module, loader, function, description, store)))
    offsets = torch.zeros(len(loader.dataset) + 1, dtype=torch.long)  # type: ignore[arg-type]
    offsets[index + 1] = counts.long()
    offsets = offsets.cumsum(0)
    flat = torch.empty_like(values)
    flat[token_positions(offsets, index)] = values
    return flat, offsets


def _blocks(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    function: Callable[[Any], tuple[Tensor, ...]],
    description: str,
    store: ScoreStore | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield index and values of some batches after the other, from all ranks and the same on every rank.

    A block takes about `_SECONDS_PER_BLOCK`, so that not much is lost if the run is killed, and is then written to the
    store.
    """
    batches, (rank, world) = scoring_batches(loader), data_rank(trainer)
    done = 0
    for end, block in _found(trainer, batches, store):
        done = end
        yield block
    mine = list(batches[done + rank :: world])
    own, before = len(mine), len(batches[:done:world])
    if trainer.strategy.restore_checkpoint_after_setup and own < len(batches[done::world]):
        mine.append(batches[0])  # in shards, a model runs on all ranks or on none
    loaded = enumerate(zip(mine, on_device(trainer, module, loader_like(loader, mine))))
    show = trainer.is_global_zero and trainer.progress_bar_callback is not None and own > 0
    with (
        progress(None, before + own, description, show, before) as bar,
        evaluation(module),
        evaluation_stage(trainer),
    ):
        size = 1
        while done < len(batches):
            started, scored = time.perf_counter(), []
            for position, (expected, batch) in islice(loaded, size):
                values = _run(trainer, module, partial(score_batch, batch, expected, function))
                if position < own:
                    scored.append(values)
                    bar.update()
            seconds = time.perf_counter() - started
            end = min(done + size * world, len(batches))
            block, size = joined(trainer, scored, max(1, round(size * _SECONDS_PER_BLOCK / seconds)))
            if store is not None and all(torch.isfinite(value).all() for value in block):
                on_rank_zero(trainer, partial(store.add, done, end, block))
            done = end
            yield block
    drop_gathered(module)


def _found(
    trainer: Trainer, batches: Sequence[Sequence[int]], store: ScoreStore | None
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield what an interrupted sweep has left in the store of rank 0: number of batches done so far, and a block."""
    parts = store.parts(batches) if store is not None else iter(())
    while store is not None:
        part = from_rank_zero(trainer, lambda: next(parts, None))
        if part is None:
            return
        yield part


def joined(trainer: Trainer, scored: list[tuple[Tensor, ...]], size: int) -> tuple[tuple[Tensor, ...], int]:
    """Concatenate the values of batches, over all ranks in the order of ranks; and take the size that rank 0 wants."""
    processes_per_share = trainer.world_size // data_rank(trainer)[1]
    mine = () if trainer.global_rank % processes_per_share else tuple(map(torch.cat, zip(*scored)))
    if trainer.world_size == 1:
        return mine, size
    # A rank without a single batch has not seen the shapes: rank 0, which always has one, tells.
    shapes, size = trainer.strategy.broadcast(([(value.shape[1:], value.dtype) for value in mine], size))
    device = trainer.strategy.root_device
    rows = torch.zeros(trainer.world_size, len(shapes), dtype=torch.long, device=device)
    rows[trainer.global_rank] = torch.tensor([len(value) for value in mine] or [0] * len(shapes))
    rows = trainer.strategy.reduce(rows, reduce_op="sum").cpu()
    joined = []
    for position, (shape, dtype) in enumerate(shapes):
        whole = torch.zeros(int(rows[:, position].sum()), *shape, dtype=dtype, device=device)
        if mine:
            start = int(rows[: trainer.global_rank, position].sum())
            whole[start : start + len(mine[position])] = mine[position]
        joined.append(trainer.strategy.reduce(whole, reduce_op="sum").cpu())
    return tuple(joined), size


def on_device(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader as the Trainer would: through the transfer hooks, on the device."""
    hook = "on_before_batch_transfer"
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    owner = datamodule if datamodule is not None and is_overridden(hook, datamodule) else module
    for batch in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(owner.on_before_batch_transfer(batch, 0))


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


def _run(trainer: Trainer, module: LightningModule, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Call a function that runs the module, in the Trainer's precision.

    FSDP and DeepSpeed gather parameters in the forward of the module's wrapper; so the call goes through that, as
    Lightning's call of `training_step` does.
    """
    strategy: Any = trainer.strategy
    with trainer.precision_plugin.forward_context():
        if not in_wrapper(trainer, module):
            return function()
        module.scored_by_wrapper = function  # type: ignore[assignment]
        try:
            return strategy._forward_redirection(strategy.model, module, "scored_by_wrapper")  # type: ignore[no-any-return]
        finally:
            del module.scored_by_wrapper


@contextmanager
def evaluation_stage(trainer: Trainer) -> Iterator[None]:
    """Let hooks that augment `if self.trainer.training` see that this is no training."""
    before = trainer.training
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = before
