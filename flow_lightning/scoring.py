"""Room 2: a frozen model and a data set to one value per sample, by sample index, each sample exactly once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from flow_lightning.indexing import batch_index, check_indices, check_map_style

T = TypeVar("T")


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Look at a model without leaving a trace in it.

    Inside, every submodule is in evaluation mode (BatchNorm statistics stand still), no graph is recorded and no
    gradient touched. Afterwards the modes of all submodules and the state of every random number generator (torch on
    all devices, numpy, python) are as before.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    with isolate_rng(), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for submodule, training in modes.items():
                submodule.training = training


class FixedBatches(Sampler[list[int]]):
    """Batches of a data set that are always the same, each sample in one of them: batches of similar length, say.

    As the `batch_sampler` of a loader to score it says how to cut the data set, which then need not be in order.

    Args:
        batches: Positions in the data set, by batch.
    """

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = [list(batch) for batch in batches]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def share_of_rank(loader: DataLoader[Any], rank: int, world_size: int) -> Sequence[int] | FixedBatches:
    """Return what one of several processes has to score: every `world_size`-th sample, or batch if they are fixed."""
    if isinstance(loader.batch_sampler, FixedBatches):
        return FixedBatches(loader.batch_sampler.batches[rank::world_size])
    return range(rank, len(loader.dataset), world_size)  # type: ignore[arg-type]


def loader_like(
    loader: DataLoader[Any], indices: Sequence[int] | FixedBatches, batch_size: int | None = None
) -> DataLoader[Any]:
    """Make a loader over `indices`, in order, with the data set, collate function and workers of another loader.

    The other loader is never iterated, so neither its order nor its persistent workers notice.

    Args:
        loader: Where the data set comes from.
        indices: Positions in the data set, or batches of them.
        batch_size: Samples per batch; by default the other loader's.

    Raises:
        TypeError: If the data set is iterable-style.
        ValueError: If the data set is empty.
    """
    check_map_style(loader.dataset)
    if len(loader.dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("The data set is empty: there is nothing to score. Check its path and its split.")
    workers = loader.num_workers
    order: dict[str, Any] = {"sampler": indices, "batch_size": batch_size or loader.batch_size or 64}
    if isinstance(indices, FixedBatches):
        order = {"batch_sampler": indices}
    return DataLoader(
        loader.dataset,
        **order,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        prefetch_factor=loader.prefetch_factor if workers else None,
        generator=torch.Generator().manual_seed(0),
    )


def collect(
    batches: Iterable[Any],
    function: Callable[[Any], tuple[Tensor, ...]],
    indices: Sequence[int],
    allocate: Callable[..., Tensor] = torch.zeros,
    length: int | None = None,
) -> tuple[Tensor, ...]:
    """Apply a function to every batch and file what it returns by sample index.

    Args:
        batches: Batches that carry `index`, together the samples `indices` in order.
        function: Maps a batch to tensors `[B, ...]`.
        indices: The samples that the batches hold.
        allocate: Makes the zero-filled tensors for the results, called with `size, dtype=`.
        length: Samples in the whole data set, if `indices` are only a part of it.

    Returns:
        For each tensor of the function one `[length, ...]` tensor on the CPU; rows not in `indices` are 0.
        Empty if there was no batch.

    Raises:
        ValueError: If the indices in the batches are not those asked for, or the function returned a wrong shape.
    """
    results: tuple[Tensor, ...] = ()
    done = 0
    for batch in batches:
        index = batch_index(batch).cpu()
        check_indices(index, torch.as_tensor(indices[done : done + index.numel()]))
        done += index.numel()
        values = function(batch)
        for value in values:
            if value.shape[:1] != index.shape:
                raise ValueError(
                    f"A batch of {index.numel()} samples gave values of shape {tuple(value.shape)}; expected one per "
                    "sample. sample_losses(batch) must not reduce over the batch (reduction='none')."
                )
        if not results:
            size = len(indices) if length is None else length
            results = tuple(allocate((size, *value.shape[1:]), dtype=value.dtype) for value in values)
        for result, value in zip(results, values):
            result[index] = value.detach().cpu()
    return results


def progress(batches: Iterable[T], total: int, description: str, enabled: bool = True) -> Iterable[T]:
    """Show a progress bar with rate and remaining time while iterating, and leave it standing at the end."""
    shown: Iterable[T] = tqdm(
        batches, total=total, desc=description, unit="batch", dynamic_ncols=True, disable=not enabled
    )
    return shown
