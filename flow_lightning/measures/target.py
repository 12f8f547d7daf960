"""The test set of the target task: where a fit finds it.

In: Trainer and module. Out: a loader with samples numbered by position. Next: `images.py`, `text.py`.
"""

from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions import InstructionDataModule
from flow_lightning.data.samplers import FixedBatches
from flow_lightning.scoring.samples import cut_batches


def target_dataloader(trainer: Trainer) -> DataLoader[Any] | None:
    """Find the test set of the data module, else of the module, and number its samples by position.

    A fit calls `setup("fit")` only. So `test_dataloader()` is first called as things are: a data module may split anew
    in each setup, and training samples would get into the test set. If it raises an exception, `setup("test")` is
    called, as `Trainer.test` would, and `test_dataloader()` again. What they raise then is not caught.

    Returns:
        A loader in the order of the data set; None, with a warning, if there is no test set.

    Raises:
        TypeError: If it is not one DataLoader of a map-style data set.
        ValueError: If it is empty.
    """
    loader = _test_dataloader(trainer)
    if loader is None:
        rank_zero_warn("There is no test_dataloader(), so nothing is measured on the target task.")
        return None
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"test_dataloader() returned a {type(loader).__name__}; expected one DataLoader of the target test set. "
            "Return a single DataLoader."
        )
    return DataLoader(
        IndexedDataset(loader.dataset),
        batch_sampler=FixedBatches(cut_batches(loader)),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
    )


def _test_dataloader(trainer: Trainer) -> Any:
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    owners: list[Any] = [owner for owner in (datamodule, trainer.lightning_module) if owner is not None]
    owner = next((owner for owner in owners if is_overridden("test_dataloader", owner)), None)
    if owner is None or (isinstance(owner, InstructionDataModule) and owner.test is None):
        return None
    try:
        return owner.test_dataloader()
    except Exception:
        if not is_overridden("setup", owner):
            raise
        owner.setup("test")
        return owner.test_dataloader()
