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
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def scoring_batches(loader: DataLoader[Any]) -> Sequence[Sequence[int]]:
    """Cut the data set of a loader into the batches to score: its fixed batches if it has some, else in order.

    They do not depend on the number of processes, which share them: so the values do not either.

    Raises:
        TypeError: If the data set is iterable-style.
        ValueError: If the data set is empty.
    """
    check_map_style(loader.dataset)
    if len(loader.dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("The data set is empty: there is nothing to score. Check its path and its split.")
    if isinstance(loader.batch_sampler, FixedBatches):
        return loader.batch_sampler.batches
    length, size = len(loader.dataset), loader.batch_size or 64  # type: ignore[arg-type]
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def loader_like(
    loader: DataLoader[Any], batches: Sequence[Sequence[int]], workers: int | None = None
) -> DataLoader[Any]:
    """Make a loader over `batches`, in order, with the data set, collate function and workers of another loader.

    The other loader is never iterated, so neither its order nor its persistent workers notice.

    Args:
        loader: Where the data set comes from.
        batches: Positions in the data set, by batch.
        workers: Number of its processes; by default as many as the other loader has.
    """
    workers = loader.num_workers if workers is None else workers
    return DataLoader(
        loader.dataset,
        batch_sampler=FixedBatches(batches),
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        prefetch_factor=loader.prefetch_factor if workers else None,
        generator=torch.Generator().manual_seed(0),
    )


def score_batch(
    batch: Any, expected: Sequence[int], function: Callable[[Any], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Apply a function to a batch.

    Args:
        batch: A batch that carries `index`.
        expected: The samples that it should hold.
        function: Maps a batch to tensors `[B, ...]`; the first has one row per sample.

    Returns:
        The index `[B]` and what the function returned, on the CPU.

    Raises:
        ValueError: If the indices in the batch are not those expected, or the function returned a wrong shape.
    """
    index = batch_index(batch).cpu()
    check_indices(index, torch.as_tensor(expected))
    values = function(batch)
    if values[0].shape[:1] != index.shape:
        raise ValueError(
            f"A batch of {index.numel()} samples gave values of shape {tuple(values[0].shape)}; expected one per "
            "sample. sample_losses(batch) must not reduce over the batch (reduction='none')."
        )
    return index, *(value.detach().cpu() for value in values)


def progress(
    batches: Iterable[T] | None, total: int, description: str, enabled: bool = True, initial: int = 0
) -> "tqdm[T]":
    """Make a progress bar with rate and remaining time, which is left standing at the end.

    Args:
        batches: What to iterate over; None for a bar whose `update` is called by hand.
        total: Number of batches.
        description: What it says.
        enabled: Whether it is shown.
        initial: Batches that are done already, which do not count for the rate.
    """
    return tqdm(
        batches,
        total=total,
        desc=description,
        unit="batch",
        dynamic_ncols=True,
        disable=not enabled,
        initial=initial,
    )
