"""What other people's fits have beside: each with the callback equals the same fit with the weights by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as of_lightning
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from tests.unchanged import Classifier, data, fit

DATA = data()


class ByHand(Classifier):
    """The same module, whose batches carry their weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, weights = batch
        loss = (weights * F.cross_entropy(self.net(x), y, reduction="none")).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Validated(Classifier):
    """A validation, too."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def weights() -> Tensor:
    with torch.no_grad():
        losses = F.cross_entropy(Classifier().eval().net(DATA.tensors[0]), DATA.tensors[1], reduction="none")
    return torch.exp(-losses / losses.quantile(0.5))


class Ema(of_lightning.WeightAveraging):
    """An exponential moving average."""

    def __init__(self) -> None:
        super().__init__(avg_fn=get_ema_avg_fn(0.9))


#: Callbacks by what makes them, and flags of the Trainer.
CALLBACKS: dict[str, Any] = {
    "EMA": Ema,
    "SWA": lambda: of_lightning.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "EarlyStopping": lambda: of_lightning.EarlyStopping("val/loss", patience=0),
    "GradientAccumulationScheduler": lambda: of_lightning.GradientAccumulationScheduler({0: 1, 1: 2}),
    "BackboneFinetuning": lambda: of_lightning.LambdaCallback(on_fit_start=lambda t, m: m.net[0].requires_grad_(False)),
    "ModelPruning": lambda: of_lightning.ModelPruning("l1_unstructured", amount=0.2),
    "Timer": of_lightning.Timer,
    "LearningRateFinder": lambda: of_lightning.LearningRateFinder(num_training_steps=5, early_stop_threshold=None),
    "BatchSizeFinder": lambda: of_lightning.BatchSizeFinder(max_trials=1, init_val=4),
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "fast_dev_run": {"fast_dev_run": 3},
    "overfit_batches": {"overfit_batches": 2},
    "limit_train_batches": {"limit_train_batches": 3},
    "val_check_interval": {"val_check_interval": 2},
    "profiler": {"profiler": "simple"},
    "barebones": {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "deterministic": {"deterministic": True},
    "no inference mode": {"inference_mode": False},
    "detect_anomaly": {"detect_anomaly": True},
    "max_steps": {"max_steps": 7, "max_epochs": -1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("name", [*CALLBACKS, *FLAGS])
def test_other_callbacks_and_flags_do_as_with_weights_by_hand(name: str, monkeypatch: Any) -> None:
    modules = [Validated(), ByHand()]
    batches = [DATA, TensorDataset(*DATA.tensors, weights())]
    for module, dataset, own in zip(modules, batches, ([fl.FlowWeightingCallback()], [])):
        module.learning_rate, module.batch_size = 0.1, 4
        loader = DataLoader(dataset, 5, shuffle=name != "overfit_batches", generator=torch.Generator().manual_seed(3))
        validation = DataLoader(DATA, 5, generator=torch.Generator())
        callbacks = [CALLBACKS[name]()] if name in CALLBACKS else []
        settings = {"loader": loader, "val_dataloaders": validation} | FLAGS.get(name, {})
        if name.endswith("Finder"):  # they look for attributes of a module that brings its own loaders
            module.train_dataloader = lambda loader=loader, m=module: DataLoader(
                loader.dataset, m.batch_size, generator=torch.Generator()
            )
            settings |= {"loader": None, "val_dataloaders": None}
            module.val_dataloader = lambda validation=validation: validation
        fit(module, dataset, *callbacks, *own, **settings)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if name == "bf16-mixed" else {"rtol": 1e-5, "atol": 1e-6}
    for (key, mine), theirs in zip(modules[0].state_dict().items(), modules[1].state_dict().values()):
        torch.testing.assert_close(mine, theirs, msg=lambda m, key=key: f"{key}: {m}", **tolerance)
