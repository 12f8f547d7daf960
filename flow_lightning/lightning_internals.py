"""Every private name of Lightning that this library uses, each with its reason; checked with lightning 2.5.3 and 2.6.6.

In: Trainer. Out: what no public name gives, or none gives whole. Next: `scoring/samples.py`, `resume.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import seed


@contextmanager
def isolate_rng() -> Iterator[None]:
    """Put all random number generators back afterwards. Lightning's own does not after an exception."""
    isolated = seed.isolate_rng()
    isolated.__enter__()
    try:
        yield
    finally:
        isolated.__exit__(None, None, None)


def training_source(trainer: Trainer) -> Any:
    """Return what a fit trains on: the loader given to `fit`, or that of the data module's or module's own hook.

    `trainer.train_dataloader` is None until after `on_fit_start`. The tuners of Lightning look here, too.
    """
    source = trainer.fit_loop._data_source
    return source.dataloader() if source.is_defined() else None


def own_sampler(loader: Any) -> Any:
    """Return the sampler that a loader was made with; in several processes Lightning puts one of its own around it."""
    sampler = getattr(loader, "sampler", None)
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def restore_loader_state(trainer: Trainer) -> None:
    """Give a resumed run's loader its position.

    Lightning does this where it asks for the loader, but not if `configure_optimizers` has asked before
    (`trainer.estimated_stepping_batches`).
    """
    trainer.fit_loop._load_combined_loader_states()


def end_restart(trainer: Trainer) -> None:
    """Tell the loops that the resumed run is under way; their public setter may say the contrary."""
    fit_loop = trainer.fit_loop
    fit_loop._restarting = fit_loop.epoch_loop.restarting = False


def iterates_anew(trainer: Trainer) -> bool:
    """Tell, in `on_train_epoch_start`, whether the loops are yet to begin this epoch's iteration of the loader.

    They do not in the first epoch of a fit: that iteration began before `on_train_start`.
    """
    fit_loop: Any = trainer.fit_loop
    is_resuming = getattr(fit_loop, "is_resuming", False)  # lightning 2.6
    return trainer.current_epoch > 0 and not is_resuming and not fit_loop.epoch_loop.restarting
