"""The test set of the target task: where a fit finds it.

In: Trainer and module. Out: a loader with samples numbered by position. Next: `images.py`, `text.py`.
"""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions import InstructionDataModule
from flow_lightning.measures.base import Measure, Metric
from flow_lightning.scoring.samples import cut_batches, loader_like


class TargetMeasure(Measure):
    """A measure on the test set of the data module or the module; `self.loader` is None if there is no test set."""

    part = "target"
    samples = Metric("target/samples", "target test samples", "samples")
    loader: DataLoader[Any] | None = None

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Find the test set."""
        self.loader = target_dataloader(trainer)
        return {} if self.loader is None else {self.samples.key: len(self.loader.dataset)}  # type: ignore[arg-type]


def target_dataloader(trainer: Trainer) -> DataLoader[Any] | None:
    """Find the test set of the data module, else of the module: a loader in its order, samples numbered by position.

    Warns and returns None if there is no test set. A TypeError refuses anything but one DataLoader.
    """
    if (loader := _test_dataloader(trainer)) is None:
        rank_zero_warn("There is no test_dataloader(), so nothing is measured on the target task.")
        return None
    if not isinstance(loader, DataLoader):
        raise TypeError(f"test_dataloader() returned a {type(loader).__name__}; expected one DataLoader.")
    return loader_like(loader, cut_batches(loader), IndexedDataset(loader.dataset))


def validation_dataloader(trainer: Trainer) -> DataLoader[Any] | None:
    """Find the validation set of a fit that trains, in the same form; None if it has none, or several."""
    loader: Any = trainer.val_dataloaders
    if not isinstance(loader, DataLoader):
        return None
    return loader_like(loader, cut_batches(loader), IndexedDataset(loader.dataset))


def check_curve(trainer: Trainer) -> None:
    """Refuse a fit without a test set, which a curve measures at each point; warn without a validation set."""
    if target_dataloader(trainer) is None:
        raise ValueError(
            "curve=True measures the test set at each point, and there is none. Give the data module one (--data.test "
            "FILE for instructions), or leave curve out."
        )
    if validation_dataloader(trainer) is None:
        rank_zero_warn(
            "There is no validation set, so a board cannot choose among points and rates, and leaves this fit out. Set "
            "validation_fraction, to 0.1 for instance."
        )


def _test_dataloader(trainer: Trainer) -> Any:
    owners: tuple[Any, ...] = (trainer.datamodule, trainer.lightning_module)  # type: ignore[attr-defined]
    owner = next((owner for owner in owners if is_overridden("test_dataloader", owner)), None)
    if owner is None or (isinstance(owner, InstructionDataModule) and owner.test is None):
        return None
    try:  # A fit has called setup("fit") only. Where that will do, another setup could split the data anew.
        return owner.test_dataloader()
    except Exception:
        owner.setup("test")
        return owner.test_dataloader()
