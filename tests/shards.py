"""What tests of models in shards share: a record of each rank, and data in an order that ranks share."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.distributed import data_rank
from tests.images import PictureData


class Record(fl.FlowWeightingCallback):
    def on_train_end(self, trainer, pl_module):
        in_shards = all(isinstance(p, DTensor) for p in pl_module.parameters())
        whole = {name: full(p.detach()).clone() for name, p in pl_module.named_parameters()}
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in pl_module.parameters())
        found = {"held": held, "weights": self.weights.weights.clone(), "in_shards": in_shards, "parameters": whole}
        torch.save(found, f"found{trainer.global_rank}.pt")


def record_of(rank):
    return torch.load(f"found{rank}.pt", weights_only=True)


def assert_same_parameters(found, expected, rtol=0.0, atol=0.0):
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=rtol, atol=atol, msg=name)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class InOrder:
    """Rank r trains on samples r, r + world, ...: Lightning's own sampler would shuffle."""

    def train_dataloader(self):
        loader, (rank, world) = super().train_dataloader(), data_rank(self.trainer)
        order = range(rank, len(loader.dataset), world)
        return DataLoader(loader.dataset, batch_size=loader.batch_size // world, sampler=order)


class PicturesInOrder(InOrder, PictureData):
    pass
