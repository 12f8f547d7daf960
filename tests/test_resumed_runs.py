"""Vision and language, with weights and probe: a run that was killed ends as the unbroken one, to the last bit."""

import math
import os
import random
import shutil
import signal
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import flow_lightning as fl
from flow_lightning.scoring import score
from flow_lightning.trainer import FlowTrainer
from tests.examples import chain, make_trainer, slow
from tests.images import tiny_module
from tests.language import language_data, language_module
from tests.processes import launch


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
    ("make", "settings"), [(vision, {}), slow(language, {"accumulate_grad_batches": 2, "val_check_interval": 3})]
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


def in_two_processes(*kills) -> None:
    found = chain(partial(run, language, devices=2, strategy="ddp", accumulate_grad_batches=2), *kills)
    if os.environ["RANK"] == "0":
        torch.save(found, "done.pt")


@pytest.mark.slow
def test_two_processes_are_resumed():
    launch(in_two_processes)
    expected = torch.load("done.pt")
    launch(in_two_processes, 3)
    assert_equal(torch.load("done.pt"), expected)


def go_on(folder: Path, make) -> None:
    """Run from the last checkpoint, if there is one."""
    os.chdir(folder)
    score._SECONDS_PER_BLOCK = 0.0
    torch.save(run(partial(make, "weights.safetensors"), ckpt_path="last"), "done.pt")


def seconds_of(folder: Path, make, kill_after: float | None = None) -> float:
    """Let a process of its own go on, kill it after some seconds, and return how long it ran."""
    process, started = get_context("fork").Process(target=go_on, args=(folder, make)), time.perf_counter()
    process.start()
    process.join(kill_after or 300)
    process.kill()
    process.join()
    assert process.exitcode in {0, -signal.SIGKILL if kill_after else 0}
    return time.perf_counter() - started


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("make, kills", [(vision, 12), (language, 4)])
def test_kills_at_random_times(make, kills, tmp_path):
    """kill -9 while it scores, probes, writes weights, trains, writes a checkpoint."""
    for folder in ("whole", "killed"):
        write_pictures(tmp_path / folder / "pictures", count=40)
    seconds, generator = seconds_of(tmp_path / "whole", make), random.Random(1)
    expected = torch.load("whole/done.pt")
    for kill in range(kills):
        if kill % 4 == 0:  # from the beginning again
            shutil.rmtree("killed/ckpt", ignore_errors=True)
            Path("killed/weights.safetensors").unlink(missing_ok=True)
        seconds_of(tmp_path / "killed", make, generator.uniform(0.1, 0.7) * seconds)
        if kill % 4 == 3:
            seconds_of(tmp_path / "killed", make)
            assert_equal(torch.load("killed/done.pt"), expected)
            assert not list(Path("killed/ckpt").glob(".*"))
