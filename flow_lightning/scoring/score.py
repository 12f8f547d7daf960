"""One pass of a function over a data set, by all processes: where scoring meets devices, precision and ranks.

In: Trainer, module, loader and a function of a batch. Out: its values, by sample index. Next: `scoring.py`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flow_lightning.data.indexing import check_indices, find_index
from flow_lightning.distributed import data_rank, drop_gathered, gather
from flow_lightning.method.weights import token_positions
from flow_lightning.scoring.evaluation import evaluation, evaluation_stage
from flow_lightning.scoring.samples import cut_batches, loader_like

T = TypeVar("T")
R = TypeVar("R")
#: A function of a batch: tensors whose first has one row per sample, `[B, ...]`.
BatchFunction = Callable[[Any], tuple[Tensor, ...]]


class Block(NamedTuple):
    """The values of some batches, the same on every rank.

    Attributes:
        end: Batches that are done with this block.
        values: Index of the samples `[m]`, and the function's values for them.
    """

    end: int
    values: tuple[Tensor, ...]


#: How long a block takes: what is lost at most when scoring is killed.
_SECONDS_PER_BLOCK = 10.0


def score_dataset(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], function: BatchFunction, description: str
) -> tuple[Tensor, ...]:
    """Apply a function to every sample of a loader's data set, once, in evaluation mode, over all ranks.

    Args:
        trainer: Gives devices, precision and ranks.
        module: Is put into evaluation mode meanwhile.
        loader: Where the data set, its collate function, batch size and workers come from; it is not iterated.
        function: Maps a batch on the device to tensors `[B, ...]`.
        description: What the progress bar says.

    Returns:
        For each tensor of the function one `[n, ...]` tensor on the CPU, by sample index, the same on every rank.
    """
    batches = cut_batches(loader)
    return by_index(score_blocks(trainer, module, loader, batches, function, description), sum(map(len, batches)))


def score_blocks(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    batches: Sequence[Sequence[int]],
    function: BatchFunction,
    description: str,
    done: int = 0,
) -> Iterator[Block]:
    """Apply a function to batches of a data set and yield its values block by block, the same on every rank.

    Rank r takes batches r, r + world, r + 2 world, ... of `batches[done:]`: none twice, none padded. The bare module is
    called, not the wrapped one, whose forward would wait for ranks that have no batch left. A block takes about ten
    seconds. Arguments are those of `score_dataset`.
    """
    rank, world = data_rank(trainer)
    mine, before = batches[done + rank :: world], len(batches[:done:world])
    # In shards, a model runs on all ranks or on none: a rank without a batch runs one for nothing.
    spare = trainer.strategy.restore_checkpoint_after_setup and len(mine) < len(batches[done::world])
    read = partial(_batch_values, trainer, module, loader, function)
    show = trainer.is_global_zero and trainer.progress_bar_callback is not None and len(mine) > 0
    with progress(before + len(mine), description, show, before) as bar, evaluation(module), evaluation_stage(trainer):
        values = _run(trainer, read, mine, batches[:1] if spare else (), bar.update)
        size = 1  # batches of each rank in a block; rank 0 sets it by its clock
        while done < len(batches):
            started = time.perf_counter()
            block = gather(trainer, list(islice(values, size)))
            done = min(done + size * world, len(batches))
            seconds = time.perf_counter() - started
            size = trainer.strategy.broadcast(max(1, round(size * _SECONDS_PER_BLOCK / seconds)))
            yield Block(done, block)
    drop_gathered(module)


def _run(
    trainer: Trainer, read: Callable[..., Any], mine: Sequence[Any], spare: Sequence[Any], on_batch: Callable[[], Any]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield index and values of this rank's batches; run spare ones without a word.

    Where a batch does not fit into memory, it and those after it are read again and scored in halves, quarters, ... .
    No process waits for another one here, so each finds out by itself. Shards do wait, so they are not cut.
    """
    wanted, done, parts = [*mine, *spare], 0, 1
    while done < len(wanted):
        try:
            for values in read([_cut(batch, parts) for batch in wanted[done:]]):
                done += 1
                if done <= len(mine):
                    on_batch()
                    yield values
        except RuntimeError as error:
            _go_on_with_half(trainer, -(-len(wanted[done]) // parts), error)
            parts *= 2
        if done < len(wanted):
            garbage_collection_cuda()  # here, where the error no longer holds the tensors of the failed batch


def with_what_fits(trainer: Trainer, function: Callable[[list[T]], R], samples: list[T]) -> R:
    """Call a function with samples: all of them, or the first half, quarter, ... that fits into memory."""
    while True:
        try:
            return function(samples)
        except RuntimeError as error:
            _go_on_with_half(trainer, len(samples), error)
        samples = samples[: -(-len(samples) // 2)]
        garbage_collection_cuda()


def _go_on_with_half(trainer: Trainer, size: int, error: RuntimeError) -> None:
    """Say that so many samples do not fit into memory; raise an error that says otherwise, or that less cannot be."""
    if not is_out_of_memory(error):
        raise error
    if size == 1 or trainer.strategy.restore_checkpoint_after_setup:
        raise torch.OutOfMemoryError(
            f"Scoring {size} sample(s) at a time takes more memory than there is ({error}). Use a smaller "
            "batch, shorter samples, a lower precision, or a larger device."
        ) from error
    rank_zero_warn(f"Scoring {size} samples at a time takes too much memory. Going on with half as many.")


def _batch_values(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], function: BatchFunction, cuts: list[Any]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield index and values of batches, each cut into pieces that are scored in turn, in the Trainer's precision."""
    pieces = [piece for cut in cuts for piece in cut]
    read = iter(zip(pieces, on_device(trainer, module, loader_like(loader, pieces))))
    for cut in cuts:
        values = []
        for expected, batch in islice(read, len(cut)):
            vars(module)["batch_samples"] = torch.as_tensor(expected)
            try:
                with trainer.precision_plugin.forward_context():
                    values.append(_score_batch(batch, expected, function))
            finally:
                del vars(module)["batch_samples"]
        yield tuple(map(torch.cat, zip(*values)))


def _cut(batch: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Cut a batch into at most so many pieces, the last one perhaps smaller."""
    size = -(-len(batch) // parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether a device or the CPU has no memory left, also where another error was made of that."""
    texts = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError)
        or any(text in str(error) for text in texts)
        or is_out_of_memory(error.__cause__)
    )


def by_index(
    blocks: Iterable[Block], length: int, allocate: Callable[..., Tensor] = torch.zeros, wanted: bool = True
) -> tuple[Tensor, ...]:
    """Put the values of blocks in the order of the samples: for each tensor of the function one `[n, ...]`.

    A rank that does not want them takes no memory and gets nothing. `allocate(size, dtype=)` makes the tensors.
    """
    results: tuple[Tensor, ...] = ()
    for _, (index, *values) in blocks:
        if not wanted:
            continue
        results = results or tuple(allocate((length, *value.shape[1:]), dtype=value.dtype) for value in values)
        for result, value in zip(results, values):
            result[index] = value
    return results


def ragged_by_index(blocks: Iterable[Block], length: int) -> tuple[Tensor, Tensor]:
    """Put values in the order of the samples, where blocks hold index, number of values of each sample, and values.

    Returns:
        Values of all samples `[K]`, and offsets `[n + 1]`: sample i has `offsets[i]` to `offsets[i + 1]`.
    """
    index, counts, values = map(torch.cat, zip(*(block.values for block in blocks)))
    offsets = torch.zeros(length + 1, dtype=torch.long)
    offsets[index + 1] = counts.long()
    offsets = offsets.cumsum(0)
    flat = torch.empty_like(values)
    flat[token_positions(offsets, index)] = values
    return flat, offsets


def on_device(trainer: Trainer, module: LightningModule, loader: Iterable[Any]) -> Iterator[Any]:
    """Yield batches as the Trainer would: through the transfer hooks, on the device."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    hook = "on_before_batch_transfer"
    is_own = datamodule is not None and is_overridden(hook, datamodule, DataHooks)  # one of pytorch_lightning, too
    owner = datamodule if is_own else module
    for batch in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(owner.on_before_batch_transfer(batch, 0))


def _score_batch(batch: Any, expected: Sequence[int], function: BatchFunction) -> tuple[Tensor, ...]:
    """Return the samples' index `[B]` and the function's values, on the CPU; refuse other samples and wrong shapes."""
    index, own = torch.as_tensor(expected), find_index(batch)
    if own is not None:
        check_indices(own, index)
    values = function(batch)
    if values[0].shape[:1] != index.shape:
        raise ValueError(
            f"A batch of {index.numel()} samples gave values of shape {tuple(values[0].shape)}; expected one per "
            "sample. sample_losses(batch) must not reduce over the batch (reduction='none')."
        )
    return index, *(value.detach().cpu() for value in values)


def progress(total: int, description: str, enabled: bool = True, initial: int = 0) -> "tqdm[Any]":
    """Make a progress bar that stays on the screen; `initial` batches are done and do not count for the rate."""
    return tqdm(total=total, desc=description, unit="batch", dynamic_ncols=True, disable=not enabled, initial=initial)
