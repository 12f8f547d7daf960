"""However the processes are started, and on however many hosts: the weights are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import fit_in_process
from tests.processes import free_port, launch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def expected(tmp_path):
    fit_in_process.run(where=str(tmp_path / "one"))
    return torch.load("one/found0.pt", weights_only=True)["weights"]


@pytest.fixture(autouse=True)
def folders():
    for name in ("one", "0", "1"):
        Path(name).mkdir()


def written(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def node(where) -> None:
    """One process on a host of its own, with a disk of its own."""
    rank = os.environ["RANK"]
    os.environ.update({"LOCAL_RANK": "0", "GROUP_RANK": rank, "LOCAL_WORLD_SIZE": "1"})
    fit_in_process.run(where=str(Path(where) / rank), num_nodes=2, devices=1, strategy="ddp")


def test_two_nodes_weigh_as_one_process_and_only_the_first_writes(expected, tmp_path):
    launch(node, tmp_path)
    found = [torch.load(f"{rank}/found{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(each["weights"], expected) for each in found)
    assert found[0]["scored"] + found[1]["scored"] == 23 and found[1]["scored"] > 0
    assert "run/flow_weights.safetensors" in written("0")
    assert written("1") == ["found1.pt"]  # what the test wrote


def start(settings: dict, *launcher: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "tests.fit_in_process", json.dumps(settings)]
    return subprocess.Popen(command, env=environment)


def weights_of(rank: int, folder: str) -> torch.Tensor:
    return torch.load(f"{folder}/found{rank}.pt", weights_only=True)["weights"]


@pytest.mark.slow
def test_torchrun_on_two_nodes(expected, tmp_path):
    nodes, address = [], ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    for rank in (0, 1):
        settings = {"where": str(tmp_path / str(rank)), "num_nodes": 2, "devices": 1, "strategy": "ddp"}
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}"]
        nodes.append(start(settings, *torchrun, *address))
    assert [process.wait(timeout=200) for process in nodes] == [0, 0]
    assert all(torch.equal(weights_of(rank, str(rank)), expected) for rank in (0, 1))
    assert written("1") == ["found1.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp"])
def test_lightnings_own_launchers(expected, tmp_path, strategy):
    settings = {"where": str(tmp_path / "0"), "devices": 2, "strategy": strategy}
    assert start(settings).wait(timeout=200) == 0
    assert all(torch.equal(weights_of(rank, "0"), expected) for rank in (0, 1))
