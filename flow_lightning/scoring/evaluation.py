"""The state in which a model is looked at: nothing that training could notice.

In: module and Trainer. Out: contexts. Next: `samples.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer
from torch import nn

from flow_lightning.lightning_internals import isolate_rng


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


@contextmanager
def evaluation_stage(trainer: Trainer) -> Iterator[None]:
    """Let hooks that augment `if self.trainer.training` see that this is no training."""
    before = trainer.training
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = before


def batch_norms(model: nn.Module) -> nn.ModuleList:
    """Return the BatchNorm layers of a model: the part that keeps running statistics of its inputs.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))))
        1
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return nn.ModuleList(layer for layer in model.modules() if isinstance(layer, kinds))
