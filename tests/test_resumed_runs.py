"""Whatever kills a run and wherever: the rerun ends as the unbroken one, to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import flow_lightning as fl
from flow_lightning.callbacks import sweep as sweep_module
from tests.examples import make_trainer
from tests.images import tiny_module
from tests.modules.test_causal_language import language_data, language_module

ROOT = Path(__file__).parents[1]


def pictures(folder: Path, count: int = 12) -> None:
    generator = random.Random(0)
    for split in ("train", "test"):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = bytes(generator.randrange(256) for _ in range(12 * 12 * 3))
            Image.frombytes("RGB", (12, 12), noise).save(path)


def vision():
    """Random crops, dropout, momentum and a schedule: much that a resumed run could get wrong."""
    module = tiny_module(model_kwargs={"drop_rate": 0.5}, learning_rate=0.01)
    data = fl.ImageDataModule(
        "folder", root="pictures", image_size=8, batch_size=2, num_workers=0, transforms="random_resized_crop"
    )
    return module, data, [fl.LinearProbeCallback(cache="cache"), fl.FlowWeightingCallback(cache="cache")]


def language(per="token"):
    torch.manual_seed(0)
    module = language_module(tune="lora", lora_dropout=0.5)
    data = language_data(Path.cwd(), 13, batch_size=2, tokens_per_batch=150)
    return module, data, [fl.FlowWeightingCallback(cache="cache", per=per)]


class Stop(Callback):
    """Stands for a run that dies after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise SystemExit


def run(make, after=None, every=1, ckpt_path=None, **settings):
    """Fit two epochs, or the first batches of them, and return weights and parameters."""
    seed_everything(3, verbose=False)
    module, data, callbacks = make()
    checkpoint = ModelCheckpoint("ckpt", save_last=True, every_n_train_steps=every, save_top_k=1)
    extra = [] if after is None else [Stop(after)]
    settings = {"max_epochs": 2, "enable_checkpointing": True, "deterministic": True} | settings
    trainer = make_trainer(*callbacks, checkpoint, *extra, plugins=[fl.AtomicCheckpointIO()], **settings)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except SystemExit:
        return None
    return callbacks[-1].weights.weights, {name: p.detach().clone() for name, p in module.state_dict().items()}


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("make", [vision, language])
@pytest.mark.parametrize("after", [1, 4, 6, 7, 9])
def test_a_resumed_run_ends_as_the_unbroken_one(make, after, tmp_path):
    """Killed in mid-epoch, at its end (6 or 7 batches) and in the second one."""
    pictures(Path("pictures"))
    expected = run(make)
    Path("ckpt/last.ckpt").unlink()
    assert run(make, after) is None
    assert_equal(run(make, ckpt_path="ckpt/last.ckpt"), expected)


def test_gradient_accumulation_is_resumed(tmp_path):
    pictures(Path("pictures"))
    expected = run(vision, accumulate_grad_batches=2)
    Path("ckpt/last.ckpt").unlink()
    assert run(vision, 2, accumulate_grad_batches=2) is None
    assert_equal(run(vision, ckpt_path="ckpt/last.ckpt", accumulate_grad_batches=2), expected)


def main(folder: str) -> None:
    """The run that is killed: goes on from its last checkpoint, if it has one."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sweep_module._SECONDS_PER_BLOCK = 0.0
    last = Path("ckpt/last.ckpt")
    found = run(slow_vision, ckpt_path=str(last) if last.exists() else None)
    fl.AtomicCheckpointIO().save_checkpoint({"weights": found[0], "parameters": found[1]}, "done.pt")


def slow_vision():
    """Enough time in each part to be killed there."""
    module, data, callbacks = vision()
    for name, seconds in (("features", 0.15), ("training_step", 0.15)):
        setattr(module, name, delayed(getattr(module, name), seconds))
    return module, data, callbacks


def delayed(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def started(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLOW_LIGHTNING_CACHE": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from tests.test_resumed_runs import main; main({json.dumps(str(folder))})"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_points(tmp_path):
    """kill -9 while it scores, solves the probe, trains, or writes; each rerun goes on, and the end is the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        pictures(folder / "pictures", count=40)
    begin = time.monotonic()
    assert started(whole).wait(timeout=600) == 0
    length = time.monotonic() - begin
    expected = torch.load(whole / "done.pt", weights_only=True)
    generator, kills, rounds, phases = random.Random(1), 0, 0, set()
    while kills < 20:
        process = started(broken)
        try:
            assert process.wait(timeout=generator.uniform(0.3, 1.1) * length) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            phases.add("training" if any(broken.glob("ckpt/*")) else "scoring" if any(broken.glob("cache/*/*")) else "")
            continue
        found = torch.load(broken / "done.pt", weights_only=True)
        assert torch.equal(found["weights"], expected["weights"])
        assert all(torch.equal(found["parameters"][name], value) for name, value in expected["parameters"].items())
        rounds += 1
        for name in ("cache", "ckpt", "run"):  # from the beginning again
            subprocess.run(["rm", "-rf", str(broken / name)], check=True)
        (broken / "done.pt").unlink()
    assert started(broken).wait(timeout=600) == 0
    found = torch.load(broken / "done.pt", weights_only=True)
    assert all(torch.equal(found["parameters"][name], value) for name, value in expected["parameters"].items())
    assert rounds > 0 and phases >= {"scoring", "training"}
