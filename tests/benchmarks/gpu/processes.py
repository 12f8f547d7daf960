"""Two processes against one: a weighted fit of an unchanged module ends at the same parameters.

In: gloo on the CPU, NCCL where there are two GPUs. Out: relative errors. Next: `vision.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import flow_lightning as fl
from tests.benchmarks.gpu.rows import Row, row, skipped

_SAMPLES, _BATCH = 48, 8


class Classifier(LightningModule):
    """A module that declares nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.data = TensorDataset(torch.randn(_SAMPLES, 4), torch.arange(_SAMPLES) % 3)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sampler = DistributedSampler(self.data, world, rank, shuffle=False)  # Lightning's own would shuffle
        return DataLoader(self.data, _BATCH // world, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fitted(processes: int, accelerator: str, strategy: str) -> Tensor:
    """Fit with weights, on batches of eight in all processes together; return the parameters."""
    module, quiet = Classifier(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings: dict[str, Any] = {"accelerator": accelerator, "devices": processes, "strategy": strategy, **quiet}
    settings["use_distributed_sampler"] = False
    trainer = Trainer(max_epochs=2, enable_model_summary=False, callbacks=[fl.FlowWeightingCallback()], **settings)
    trainer.fit(module)
    return torch.cat([parameter.detach().cpu().flatten() for parameter in module.parameters()])


def processes(device: str, tiny: bool) -> Iterator[Row]:
    """Compare two processes with one. Where CUDA has been used, a process cannot be forked any more."""
    start = torch.cat([parameter.detach().flatten() for parameter in Classifier().parameters()])
    alone = fitted(1, "cpu", "auto")

    def compared(name: str, found: Tensor) -> Row:
        error = float((found - alone).norm() / (alone - start).norm())
        return row(f"parameters, {name}", error, "relative error", 1e-5)

    launcher = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    yield compared("2 processes, gloo", fitted(2, "cpu", launcher))
    if torch.cuda.device_count() < 2:
        yield skipped("parameters, 2 processes, NCCL", "it needs two GPUs")
    else:
        yield compared("2 processes, NCCL", fitted(2, "cuda", launcher))
