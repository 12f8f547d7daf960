"""One project that is not ours: how it trains, what its losses are by hand, and how far FLOW is from that."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import flow_lightning as fl

SIZE, CLASSES = 4, 5  # samples in a batch


@dataclass
class Project:
    """A module with its data, and its losses written by hand.

    Attributes:
        package: The distribution that it comes from.
        name: Of the module and its loss.
        module: Makes the module.
        loader: Makes the loader that it trains on, with a list as its sampler.
        losses: Of module and batch, by hand, `[B]`; none where a module is refused.
        weighted: Of module, batch and weights, by hand; by default `mean(w l)`.
        sample_losses: What the callback gets as a second line.
        refused: Words of the error, where a module is refused.
        fit: Trains module and loader with callbacks, where that is not Lightning's own Trainer.
        measured: Gives the two errors, where the callback has no part.
        lines: What changes in the user's code.
    """

    package: str
    name: str
    module: Callable[[], Any]
    loader: Callable[[], Any]
    losses: Callable[[Any, Any], Tensor] | None = None
    weighted: Callable[[Any, Any, Tensor], Tensor] | None = None
    sample_losses: Callable[[Any, Any], Tensor] | None = None
    refused: str = ""
    fit: Callable[[Any, Any, list[Any]], Any] | None = None
    measured: Callable[[], tuple[float, float]] | None = None
    lines: int = 1


#: Words of the errors that refuse many modules.
GIVE_LOSSES, OTHERS, ONLY_TRAINS = "Give the losses yourself", "depends on the others", "fails in evaluation mode"


class Task(LightningModule):
    """A network of a package, and a training step as users write it; `step` gives the loss of module and batch."""

    def __init__(self, network: nn.Module, step: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.network, self.step = network, step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(self, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class FirstStep(Callback):
    """Keeps a copy of the untrained module, and batch, random numbers and gradient of the first step."""

    def __init__(self) -> None:
        self.module: Any = None
        self.loader: Any = None
        self.batch: Any = None
        self.random: Any = None
        self.gradients: list[Tensor | None] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.fitted, self.module = pl_module, copy.deepcopy(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch is None:
            self.loader = trainer.train_dataloader
            self.batch, self.random = copy.deepcopy(batch), (torch.get_rng_state(), np.random.get_state())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if not self.gradients:
            self.gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]


def measure(project: Project) -> tuple[float, float]:
    """Fit with FLOW weights, and compare with what is computed by hand; return the largest errors, as shares.

    The first is that of the losses, relative to the largest loss, the second that of the first step's gradient.
    """
    if project.measured is not None:
        return project.measured()
    torch.manual_seed(0)
    module, batches = project.module(), project.loader()
    flow, first = fl.FlowWeightingCallback(sample_losses=project.sample_losses), FirstStep()
    torch.manual_seed(1)
    (project.fit or fit)(module, batches, [flow, first])
    assert project.losses is not None, "not refused"
    frozen, twin, loader = copy.deepcopy(first.module).eval(), first.module.train(), first.loader
    assert not (set(vars(first.fitted)) - set(vars(twin))) & {"training_step", "sample_losses", "sample_weights", "log"}
    with torch.no_grad():
        each = [project.losses(frozen, loader.collate_fn([loader.dataset[i]])) for i in range(len(loader.dataset))]
    order = torch.tensor(list(loader.sampler))[: loader.batch_size]
    weights = flow.weights.weights[order]
    assert weights.std() > 1e-3, "equal weights prove nothing"
    torch.testing.assert_close(weights, (-flow.weights.losses[order] / flow.weights.temperature).exp())
    torch.set_rng_state(first.random[0])
    np.random.set_state(first.random[1])
    weighted = project.weighted or (lambda module, batch, weights: (weights * project.losses(module, batch)).mean())
    weighted(twin, first.batch, weights).backward()
    pairs = [(a, b.grad) for a, b in zip(first.gradients, twin.parameters())]
    assert all((a is None) == (b is None) for a, b in pairs)
    mine, theirs = (torch.cat([pair[i].flatten() for pair in pairs if pair[0] is not None]) for i in (0, 1))
    return apart(flow.weights.losses, torch.cat(each).float()), apart(mine, theirs)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


_OFF = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
QUIET: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", **dict.fromkeys(_OFF, False)}


def fit(module: LightningModule, loader: Any, callbacks: list[Callback]) -> None:
    """Train for two epochs with Lightning's own Trainer."""
    Trainer(callbacks=callbacks, **QUIET).fit(module, loader)


def fit_elsewhere(module: Any, loader: Any, callbacks: list[Any]) -> None:
    """Train with the classes of `pytorch_lightning`, which are others than those of `lightning`."""
    import pytorch_lightning

    datamodule = pytorch_lightning.LightningDataModule()
    vars(datamodule)["train_dataloader"] = lambda: loader
    pytorch_lightning.Trainer(callbacks=callbacks, **QUIET).fit(module, datamodule=datamodule)


Parts = Callable[[Any, Any], tuple[Tensor, Tensor]]


def means(parts: Parts) -> Callable[[Any, Any], Tensor]:
    """Return each sample's mean over its own elements; `parts` gives losses and which of them count, `[B, ...]`."""

    def losses(module: Any, batch: Any) -> Tensor:
        losses, counts = (part.flatten(1) for part in parts(module, batch))
        return (losses * counts).sum(1) / counts.sum(1)

    return losses


def mean_of_all(parts: Parts) -> Callable[[Any, Any, Tensor], Tensor]:
    """Return the mean over all elements of the batch, each with the weight of its sample."""

    def weighted(module: Any, batch: Any, weights: Tensor) -> Tensor:
        losses, counts = (part.flatten(1) for part in parts(module, batch))
        return (weights[:, None] * losses * counts).sum() / counts.sum()

    return weighted


def loader(make: Callable[[torch.Generator], Any], n: int = 10, **arguments: Any) -> Callable[[], DataLoader[Any]]:
    """Return what makes a shuffled loader of `n` random samples, each made by `make(generator)`."""

    def load() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(2)
        items: Any = [make(generator) for _ in range(n)]
        return DataLoader(items, SIZE, sampler=order(n), generator=generator, **arguments)

    return load


def order(n: int) -> list[int]:
    """Return a shuffled order that is always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(3)).tolist()
