"""FSDP2: a model larger than one device, in shards, under Lightning's ModelParallelStrategy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: LightningModule, root: nn.Module, blocks: Iterable[nn.Module], methods: Iterable[str] = ()) -> bool:
    """Shard a model over the data-parallel ranks, for `configure_model`; does nothing under other strategies.

    Each block's parameters are gathered right before it runs and dropped after it, so that a device holds its shard,
    one block, and what is in no block.

    Args:
        module: The LightningModule.
        root: The model; what is in no block is gathered when it runs.
        blocks: Parts of it that run one after the other.
        methods: Methods of `module` that run parts of `root`, not all of it: they gather what is in no block, too.

    Returns:
        Whether the model is in shards now.
    """
    if module._trainer is None or not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return False
    if isinstance(root, FSDPModule):  # by an earlier fit or test
        return True
    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    root.to(memory_format=torch.contiguous_format)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for name in methods:
        alias = f"_of_lightning_module_{name}"
        setattr(root, alias, getattr(module, name))
        register_fsdp_forward_method(root, alias)
        setattr(module, name, getattr(root, alias))
    return True


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Return which share of the data this process takes, and the number of shares.

    Processes that hold parts of one layer (tensor parallelism) take the same share; their ranks are consecutive.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        share: dict[str, Any] = trainer.strategy.distributed_sampler_kwargs
        return share["rank"], share["num_replicas"]
    return trainer.global_rank, trainer.world_size


def in_wrapper(trainer: Trainer, module: LightningModule) -> bool:
    """Tell whether parameters are whole only in the forward of a wrapper of the module, as FSDP and DeepSpeed do."""
    return trainer.strategy.restore_checkpoint_after_setup and trainer.strategy.model is not module


@contextmanager
def whole_parameters(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Make the parameters of a module in a wrapper whole, and keep what is written into them.

    Raises:
        TypeError: If the strategy has no way to do so.
    """
    wrapper = trainer.strategy.model
    if isinstance(wrapper, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapper):
            yield
    elif in_wrapper(trainer, module):
        raise TypeError(
            f"Under {type(trainer.strategy).__name__} a fitted head cannot be put into the model. Use ddp, "
            "ModelParallelStrategy or FSDPStrategy, or leave LinearProbeCallback and HeadRefitCallback out."
        )
    else:
        yield


def drop_gathered(module: nn.Module) -> None:
    """Drop the parameters that a forward has gathered, so that what is written into parameters goes to the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this process: all of it, if it is not in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a value, the same on all processes, into a parameter, in shards or not."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
