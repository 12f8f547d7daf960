"""The directory of a run: one run writes into it at a time, and in it only rank 0."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from weakref import WeakKeyDictionary

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from flow_lightning.files import check_writable, lock_folder, unlock
from flow_lightning.report import METRICS, read_metrics

T = TypeVar("T")
#: What a run needs beside its checkpoints: weights, pictures, tables.
_LEAST_ROOM = 8 * 2**20


@dataclass
class _Claim:
    """What a fit holds of its directories."""

    locks: list[BinaryIO | None] = field(default_factory=list)
    begun: bool = False


_claims: "WeakKeyDictionary[Trainer, _Claim]" = WeakKeyDictionary()


def run_directory(trainer: Trainer) -> Path:
    """Return the directory of this run: the logger's, or `default_root_dir` without a logger.

    To be called on every rank: rank 0 tells the others.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # Other loggers have one folder for all runs; Lightning's checkpoints go to this one in it.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    place = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return Path(trainer.strategy.broadcast(str(place)))


def claim_run(trainer: Trainer, module: LightningModule) -> None:
    """Claim the run's directory and the folders of its checkpoints, before anything in them is touched.

    To be called on every rank, in `setup` of each callback that writes there; the first one does it. The claim ends
    with `release_run`, or with the process, however that ends.

    Raises:
        OSError: If one of them is read-only, full or used by another run: before scoring and training, not after.
    """
    if trainer in _claims:
        return
    directory = run_directory(trainer)
    checkpoints = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    model = sum(tensor.nbytes for tensor in module.state_dict().values() if hasattr(tensor, "nbytes"))

    def claim() -> list[BinaryIO | None]:
        check_writable(directory, _LEAST_ROOM + (model if None in checkpoints else 0))  # None: in this directory
        local = {Path(folder).absolute() for folder in checkpoints if folder is not None and "://" not in str(folder)}
        for folder in local:
            check_writable(folder, model)
        return [lock_folder(folder) for folder in sorted(local | {directory.absolute()})]

    _claims[trainer] = _Claim(on_rank_zero(trainer, claim) or [])


def begin_run(trainer: Trainer, resumed: bool) -> None:
    """Remove the `metrics.json` of an older run in this run's directory, unless this fit goes on with that run.

    To be called on every rank, in `on_fit_start` of each callback that writes there; the first one does it. Callbacks
    add their numbers to that file one by one, so numbers of an older run would stay among them.
    """
    claim, file = _claims[trainer], run_directory(trainer) / "metrics.json"

    def forget() -> None:
        if file.exists() and {metric.key for metric in METRICS} & read_metrics(file).keys():  # not somebody else's file
            file.unlink()

    if not (claim.begun or resumed):
        on_rank_zero(trainer, forget)
    claim.begun = True


def release_run(trainer: Trainer) -> None:
    """Give the directories back; to be called when a fit is over or has failed."""
    claim = _claims.pop(trainer, None)
    for lock in claim.locks if claim is not None else []:
        if lock is not None:
            unlock(lock)


def on_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T | None:
    """Call a function on rank 0 alone; if it fails there, every rank fails, where it would wait for rank 0 for ever.

    Returns:
        What the function returned; None on the other ranks.

    Raises:
        RuntimeError: On the other ranks, with the message of rank 0's exception.
    """
    result, failure = None, None
    if trainer.is_global_zero:
        try:
            result = function()
        except Exception as error:
            failure = error
    message: Any = trainer.strategy.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"Rank 0 failed: {message}")
    return result


def from_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone and return its result on every rank; see `on_rank_zero`."""
    result: Any = trainer.strategy.broadcast(on_rank_zero(trainer, function))
    return result  # type: ignore[no-any-return]


def is_trained(checkpoint: dict[str, Any]) -> bool:
    """Tell whether the model in a checkpoint has been trained, so that it is no longer the pre-trained one.

    Tuners save and load a checkpoint of step 0, and leave its path in `trainer.ckpt_path`: that is no resumed fit.
    """
    return bool(checkpoint.get("global_step", 0) > 0)
