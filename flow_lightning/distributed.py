"""What differs between one process and several: ranks, gathering, models in shards (FSDP2).

In: Trainer, module, tensors. Out: the same on every rank. Next: `run.py`, `scoring/score.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def shard(module: LightningModule, root: nn.Module, blocks: Iterable[nn.Module], methods: Iterable[str] = ()) -> bool:
    """Shard a model over the data-parallel ranks, for `configure_model`; does nothing under other strategies.

    Each of the `blocks` of `root` is gathered right before it runs and dropped after it; so is what is in no block.
    `methods` are those of `module` that run parts of `root`. Returns whether the model is in shards now.
    """
    if not is_attached(module) or not isinstance(module.trainer.strategy, ModelParallelStrategy):
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


def check_strategy(trainer: Trainer) -> None:
    """Refuse, by a TypeError, strategies with parameters that are whole only in the forward of a module's wrapper."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise TypeError(
            f"{type(trainer.strategy).__name__} is not supported: its parameters are whole only in its own forward. "
            "Use 'ddp', or ModelParallelStrategy (FSDP2) for a model larger than one device."
        )


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


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all processes if it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_tensors(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Copy what training may change, on the CPU: trainable parameters and buffers, whole if they are in shards."""
    drop_gathered(module)
    unfreezes = any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return {
        name: whole(value).detach().cpu().clone()
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and (unfreezes or value.requires_grad or not isinstance(value, nn.Parameter))
    }


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters and buffers of these names, in shards or not."""
    own = module.state_dict()
    for name, value in tensors.items():
        fill(own[name], value)


def on_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T | None:
    """Call a function on rank 0 alone and return its result there, None on the other ranks.

    If it fails, every rank fails, where it would wait for ever: the others by a RuntimeError with the message.
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


def is_attached(module: LightningModule) -> bool:
    """Return whether a Trainer runs this module."""
    try:
        return module.trainer is not None
    except RuntimeError:  # how LightningModule says that there is none
        return False


def gather(trainer: Trainer, values: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the tensors of each rank's batches on the CPU, by rank; processes that share data count once."""
    mine = tuple(map(torch.cat, zip(*values)))
    if trainer.world_size == 1:
        return mine
    parts: list[tuple[Tensor, ...]] = [()] * trainer.world_size
    torch.distributed.all_gather_object(parts, mine)
    different = parts[:: trainer.world_size // data_rank(trainer)[1]]
    return tuple(map(torch.cat, zip(*(part for part in different if part))))
