"""Vision and language, with weights and probe: a run that was killed ends as the unbroken one, to the last bit."""

import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image

import flow_lightning as fl
from flow_lightning.scoring import score, store
from flow_lightning.trainer import FlowTrainer
from tests.examples import chain, make_trainer
from tests.images import tiny_module
from tests.language import language_data, language_module
from tests.processes import launch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def pictures(tmp_path) -> None:
    write_pictures(tmp_path / "pictures")


def write_pictures(folder: Path, count: int = 12) -> None:
    generator = random.Random(0)
    for split in ("train", "test"):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = bytes(generator.randrange(256) for _ in range(12 * 12 * 3))
            Image.frombytes("RGB", (12, 12), noise).save(path)


def vision(weights_file=None):
    """Random crops, dropout, BatchNorm, momentum and a schedule: much that a resumed run could get wrong."""
    module = tiny_module(model_kwargs={"drop_rate": 0.5}, learning_rate=0.01, batch_norm="train")
    data = fl.ImageDataModule(
        "folder", "pictures", 8, 2, num_workers=0, transforms="random_resized_crop", validation_fraction=0
    )
    return module, data, [fl.LinearProbeCallback(refit=False), fl.FlowWeightingCallback(weights_file=weights_file)]


def language(weights_file=None):
    per = "token" if weights_file is None else "sample"  # token losses are rounded in a file
    torch.manual_seed(0)
    module = language_module(tune="lora", lora_dropout=0.5)
    data = language_data(Path.cwd(), 13, batch_size=2, tokens_per_batch=150)
    return module, data, [fl.FlowWeightingCallback(per=per, weights_file=weights_file)]


def run(make, *others, ckpt_path=None, **settings):
    """Fit two epochs and return weights and parameters."""
    seed_everything(3, verbose=False)
    module, data, callbacks = make()
    checkpoint = ModelCheckpoint("ckpt", save_last=True, every_n_train_steps=1, save_top_k=1)
    settings = {"max_epochs": 2, "enable_checkpointing": True, "deterministic": True} | settings
    trainer = make_trainer(*callbacks, checkpoint, fl.ExactResumeCallback(), *others, make=FlowTrainer, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return callbacks[-1].weights.weights, {name: p.detach().clone() for name, p in module.state_dict().items()}


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize(
    ("make", "settings"), [(vision, {}), (language, {"accumulate_grad_batches": 2, "val_check_interval": 3})]
)
def test_a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(make, settings):
    """In mid-epoch, soon after, and in the next epoch (of 6 or 7 batches)."""
    assert_equal(chain(partial(run, make, **settings), 2, 1, 6), chain(partial(run, make, **settings)))


class LearningRates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_run_goes_on_for_more_epochs_than_it_was_to_have():
    run(vision, max_epochs=1)
    rates = LearningRates()
    run(vision, rates, ckpt_path="ckpt/last.ckpt", max_epochs=2)
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(7, 12)]
    assert rates.seen[1:] == pytest.approx(cosine)


def in_two_processes(make, kills) -> None:
    found = chain(partial(run, make, devices=2, strategy="ddp", accumulate_grad_batches=2), *kills)
    if os.environ["RANK"] == "0":
        torch.save(found, "done.pt")


@pytest.mark.parametrize(("make", "kills"), [(vision, (2,)), (language, (3,))])
def test_two_processes_are_resumed(make, kills):
    launch(in_two_processes, make, ())
    expected = torch.load("done.pt")
    launch(in_two_processes, make, kills)
    assert_equal(torch.load("done.pt"), expected)


def main(folder: str, make, place: str = "", call: int = 0, share: float = 0.0) -> None:
    """The run that is killed in the given call of a place; goes on from its last checkpoint, if it has one."""
    os.chdir(folder)
    torch.set_num_threads(1)
    score._SECONDS_PER_BLOCK = 0.0
    for name, (owner, attribute) in CALLS.items():
        setattr(owner, attribute, killing(getattr(owner, attribute), name, call * (name == place), share))
    os.replace = killing_writes(os.replace, place, call, share)
    found = run(partial(make, "weights.safetensors"), ckpt_path="last")
    torch.save(found, "done.pt")


CALLS = {
    "scoring": (score, "_score_batch"),
    "probing": (torch.optim.LBFGS, "step"),
    "training": (SingleDeviceStrategy, "training_step"),
}
WRITES = {"weights": "weights.safetensors", "checkpoint": "last.ckpt"}

counts: Counter[str] = Counter()


def log(name: str) -> int:
    """Write down a call and return how many there were in this process."""
    with open("calls", "a") as file:
        file.write(f"{name}\n")
    counts[name] += 1
    return counts[name]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(function, name, call, share):
    """Die a part of 10 ms after the begin of one call: in it, or soon after it."""

    def wrapped(*args, **kwargs):
        if log(name) == call:
            threading.Timer(0.01 * share, kill).start()
        return function(*args, **kwargs)

    return wrapped


def killing_writes(function, place, call, share):
    """Die when a part of a file has been written, or all of it, before it gets its name or after."""

    def wrapped(temporary, path):
        dies = False
        for name in (name for name, file_name in WRITES.items() if file_name == Path(path).name):
            dies = log(name) == call and name == place
        if dies and share < 0.8:
            os.truncate(temporary, int(os.path.getsize(temporary) * min(share / 0.6, 1.0)))
            kill()
        function(temporary, path)
        if dies:
            kill()

    return wrapped


def started(folder: Path, make, *killed) -> int:
    """Run `main` in a process of its own and return its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ", ".join([repr(str(folder)), f"runs.{make.__name__}", *map(repr, killed)])
    command = [sys.executable, "-c", f"from tests import test_resumed_runs as runs; runs.main({arguments})"]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=300).returncode


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("make, rounds", [(vision, 4), (language, 2)])
def test_kills_at_random_points_of_each_part(make, rounds, tmp_path):
    """kill -9 while it scores, probes, writes weights, trains, writes a checkpoint: 20 times for vision."""
    generator = random.Random(1)
    for folder in ("whole", *map(str, range(rounds))):
        write_pictures(tmp_path / folder / "pictures", count=40)
    assert started(tmp_path / "whole", make) == 0
    expected = torch.load("whole/done.pt")
    whole = Counter(Path("whole/calls").read_text().split())
    for folder in map(str, range(rounds)):
        left = whole["training"]
        for place in ("scoring", "probing", "weights", "training", "checkpoint"):
            if whole[place] == 0:
                continue  # language models are not probed
            most = {"weights": 1, "training": left - 1, "checkpoint": left}.get(place, whole[place])
            call = generator.randint(1, most)
            assert started(tmp_path / folder, make, place, call, generator.random()) == -signal.SIGKILL
            left -= call if place == "training" else 0
        assert started(tmp_path / folder, make) == 0
        assert_equal(torch.load(f"{folder}/done.pt"), expected)
        calls = Counter(Path(folder, "calls").read_text().split())
        # None twice but the one that it died in, and those by which each of six starts checks the blocks and the file.
        assert calls["scoring"] <= whole["scoring"] + 1 + 6 * 2 * store._CHECKED
        assert calls["training"] <= whole["training"] + 2 and calls["weights"] >= 1
        assert not list(Path(folder, "ckpt").glob(".*"))
