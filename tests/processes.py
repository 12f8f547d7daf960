"""Several processes as a launcher such as torchrun starts them, without the seconds that new interpreters take."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(function: Callable[..., Any], *args: Any, processes: int = 2) -> None:
    """Call a function in each of several forked processes, with the environment that torchrun gives them."""
    torch.multiprocessing.start_processes(
        _in_environment, (processes, free_port(), function, args), nprocs=processes, start_method="fork"
    )


def _in_environment(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    address["OMP_NUM_THREADS"] = "1"  # as torchrun sets it; more threads than before the fork would wait for ever
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    torch.set_num_threads(1)  # makes torch's pool anew after the fork, before several threads want to at once
    function(*args)
