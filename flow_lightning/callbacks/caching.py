"""What scoring found is kept, and found again by a later fit on the same model, data and transforms."""

import inspect
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.callbacks.run_directory import from_rank_zero, on_rank_zero
from flow_lightning.callbacks.sweep import evaluation_stage, on_device
from flow_lightning.files import check_writable
from flow_lightning.fingerprint import dataset_fingerprint, is_random, sample_fingerprint
from flow_lightning.identity import UnidentifiableError, identity, model_identity
from flow_lightning.modules.sharding import in_wrapper
from flow_lightning.score_store import FORMAT, ScoreStore, default_cache
from flow_lightning.scoring import FixedBatches, evaluation, loader_like, scoring_batches

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def open_store(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    purpose: Any,
    cache: bool | str | Path,
    force: bool = False,
    exclude: tuple[str, ...] = (),
) -> ScoreStore | None:
    """Open the place in the cache for the results of one sweep; to be called on every rank.

    Args:
        trainer: Precision and device count, too.
        module: The frozen model.
        loader: The samples to score.
        purpose: What is computed, and all else that it depends on.
        cache: Whether to use the cache, or its folder.
        force: Whether to remove older results.
        exclude: Prefixes of parameters that the results do not depend on.

    Returns:
        The store; None if there is to be none, or the samples change from one reading to the next.
    """
    folder = (default_cache() if cache else None) if isinstance(cache, bool) else Path(cache)
    if folder is None:
        return None
    if in_wrapper(trainer, module):
        rank_zero_info(
            f"Scores are not kept in the cache: under {type(trainer.strategy).__name__} no rank sees the parameters of "
            "the model whole, so it cannot be told whether it is the same next time. ModelParallelStrategy (FSDP2) can."
        )
        return None
    with evaluation(module), evaluation_stage(trainer):
        model = _model_or_reason(module, exclude)  # on every rank: what is in shards is gathered
        key, reason = from_rank_zero(
            trainer, lambda: _key_or_reason(trainer, module, loader, (purpose, model), folder) if model else ("", None)
        )
    if reason is not None:
        if cache is not True:
            raise OSError(reason)
        rank_zero_warn(reason)
    if not key:
        return None
    store = ScoreStore(folder, key, optional=cache is True)
    if force:
        on_rank_zero(trainer, store.clear)
    return store


def remembered(
    trainer: Trainer, store: ScoreStore | None, description: str, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what an earlier run has computed, or compute and keep it; the same on every rank."""
    if store is None:
        return compute()
    found = from_rank_zero(trainer, store.whole)
    if found is not None:
        rank_zero_info(f"{description}: taken from the cache, {store.folder} (--force computes anew).")
        return found
    computed = compute()
    on_rank_zero(trainer, lambda: store.finish(computed))
    return computed


def _model_or_reason(module: LightningModule, exclude: tuple[str, ...]) -> str | None:
    try:
        return model_identity(module, exclude)
    except UnidentifiableError as error:
        _say_unidentifiable(error)
        return None


def _key_or_reason(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], purpose: Any, folder: Path
) -> tuple[str, str | None]:
    if is_random(loader.dataset):
        return "", None
    try:
        key = identity(
            FORMAT,
            purpose,
            loader.dataset,
            dataset_fingerprint(loader.dataset),  # what a file holds may change behind all that has been looked into
            loader.collate_fn,
            _batching(loader),
            _small_batch(trainer, module, loader),
            [_hooks(owner) for owner in (trainer.datamodule, module) if owner is not None],  # type: ignore[attr-defined]
            (type(trainer.precision_plugin).__qualname__, trainer.precision, trainer.strategy.root_device.type),
            torch.get_float32_matmul_precision(),
        )
    except UnidentifiableError as error:
        _say_unidentifiable(error)
        return "", None
    try:
        check_writable(folder)
    except OSError as error:
        return "", f"The cache cannot be used: {error} Set FLOW_LIGHTNING_CACHE, or pass cache=False."
    return key, None


def _say_unidentifiable(error: UnidentifiableError) -> None:
    rank_zero_info(
        f"Scores are not kept in the cache: they depend on {error}, of which it cannot be told whether it is the same "
        "next time. A data set may define identity() -> str."
    )


def _batching(loader: DataLoader[Any]) -> Any:
    """Return how the samples are put into batches, which decides about the last bits of their losses."""
    if not isinstance(loader.batch_sampler, FixedBatches):
        return loader.batch_size
    batches = loader.batch_sampler.batches
    return torch.tensor([len(batch) for batch in batches]), torch.tensor(list(chain.from_iterable(batches)))


def _small_batch(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> str:
    """Return the fingerprint of two samples as they come to the device: collated, and through all hooks."""
    few = loader_like(loader, [scoring_batches(loader)[0][:2]], workers=0)
    return sample_fingerprint(next(on_device(trainer, module, few)))


def _hooks(owner: Any) -> Any:
    """Return what a data module or module does to its batches on their way to the device."""
    own = [hook for hook in _HOOKS if is_overridden(hook, owner)]
    if isinstance(owner, LightningDataModule):
        return [getattr(owner, hook) for hook in own]
    return [inspect.getattr_static(type(owner), hook) for hook in own]  # the module is part of the key anyway
