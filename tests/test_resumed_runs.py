"""Whatever kills a run and wherever: the rerun ends as the unbroken one, to the last bit."""

import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch.optim.lr_scheduler import ReduceLROnPlateau

import flow_lightning as fl
from flow_lightning.report.metrics import read_metrics
from flow_lightning.scoring import score as sweep_module
from flow_lightning.trainer import FlowTrainer
from tests.examples import make_trainer
from tests.images import tiny_module
from tests.language import language_data, language_module
from tests.processes import launch

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


def run(make, after=None, ckpt_path=None, checkpoint=None, **settings):
    """Fit two epochs, or the first batches of them, and return weights and parameters."""
    seed_everything(3, verbose=False)
    module, data, callbacks = make()
    checkpoint = checkpoint or ModelCheckpoint("ckpt", save_last=True, every_n_train_steps=1, save_top_k=1)
    extra = [] if after is None else [Stop(after)]
    settings = {"max_epochs": 2, "enable_checkpointing": True, "deterministic": True} | settings
    trainer = make_trainer(*callbacks, checkpoint, *extra, make=FlowTrainer, **settings)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except SystemExit:
        return None
    flow = next(callback for callback in callbacks if isinstance(callback, fl.FlowWeightingCallback))
    return flow.weights.weights, {name: p.detach().clone() for name, p in module.state_dict().items()}


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


@pytest.mark.parametrize(("make", "first"), [(vision, 6), (language, 7)])
def test_a_run_is_resumed_at_the_end_of_an_epoch_and_then_in_the_next_one(make, first, tmp_path):
    pictures(Path("pictures"))
    expected = run(make)
    Path("ckpt/last.ckpt").unlink()
    for after in (first, first + 2, first + 3):
        assert run(make, after, ckpt_path="last") is None
    assert_equal(run(make, ckpt_path="last"), expected)


def test_gradient_accumulation_is_resumed(tmp_path):
    pictures(Path("pictures"))
    expected = run(vision, accumulate_grad_batches=2)
    Path("ckpt/last.ckpt").unlink()
    assert run(vision, 2, accumulate_grad_batches=2) is None
    assert_equal(run(vision, ckpt_path="ckpt/last.ckpt", accumulate_grad_batches=2), expected)


class Plateau(fl.ImageClassificationModule):
    """A rate that falls after each epoch in which the loss has not become ten times smaller."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


def plateau():
    _, data, callbacks = vision()
    torch.manual_seed(0)
    return Plateau("test_resnet.r160_in1k", 3, pretrained=False), data, callbacks


class EpochEnds(Callback):
    """Counts, in its checkpoints, what a run does at the end of its epochs."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(f"validated {trainer.global_step}")

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(f"ended {trainer.current_epoch}")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]


def with_epoch_ends():
    module, data, callbacks = vision()
    return module, data, [*callbacks, EpochEnds()]


STEPS = {"every_n_train_steps": 1}
EPOCHS = {"every_n_epochs": 1}


@pytest.mark.parametrize(
    ("make", "kind", "when", "settings"),
    [
        (vision, ModelCheckpoint, STEPS, {"limit_train_batches": 4}),
        (vision, ModelCheckpoint, EPOCHS, {"max_epochs": 3}),
        (vision, ModelCheckpoint, EPOCHS, {"max_steps": 15, "max_epochs": -1}),
        (vision, ModelCheckpoint, STEPS, {"max_steps": 9, "max_epochs": -1}),
        (vision, ModelCheckpoint, STEPS, {"val_check_interval": 2}),
        (vision, fl.ResumableCheckpoint, {"every_n_train_steps": 3}, {"limit_train_batches": 4}),
        (plateau, ModelCheckpoint, {"every_n_train_steps": 5}, {"max_epochs": 3}),  # 5, 10 and 15 of 18
        (with_epoch_ends, fl.ResumableCheckpoint, STEPS, {"num_sanity_val_steps": 0}),
    ],
)
def test_a_run_resumes_from_each_of_its_checkpoints(make, kind, when, settings):
    """Whenever they were written, and however long the run is to be."""
    pictures(Path("pictures"))
    checkpoints = kind("all", filename="{step}", save_top_k=-1, **when)
    made = [make()]
    expected = run(lambda: made[0], checkpoint=checkpoints, **settings)
    paths = sorted(Path("all").glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        made.append(make())
        again = kind("again", filename="{step}", save_top_k=-1, **when)
        assert_equal(run(lambda: made[-1], ckpt_path=str(path), checkpoint=again, **settings), expected)
        seen = [callback.seen for _, _, callbacks in (made[0], made[-1]) for callback in callbacks[2:]]
        assert not seen or (seen[0] == seen[1] and len(seen[0]) == 4)


def test_a_run_goes_on_for_more_epochs_than_it_was_to_have():
    pictures(Path("pictures"))
    run(vision, max_epochs=1)
    rates = LearningRates()
    module, data, callbacks = vision()
    run(lambda: (module, data, [*callbacks, rates]), ckpt_path="ckpt/last.ckpt", max_epochs=3)
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(7, 18)]
    assert rates.found[1:] == pytest.approx(cosine)


class LearningRates(Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


class Die(Callback):
    def on_train_end(self, trainer, pl_module):
        raise SystemExit


def ending(*others):
    module, data, callbacks = vision()
    return module, data, [*callbacks, *others, fl.HeadRefitCallback(), fl.RetentionCallback()]


@pytest.mark.parametrize(
    "when", [{"every_n_epochs": 1, "save_last": True}, {"every_n_train_steps": 3, "save_last": True}]
)
def test_a_run_killed_after_its_last_step_does_the_work_of_its_end(when):
    """The head refit and the report; a rerun of a finished run does them again."""
    pictures(Path("pictures"))
    run(ending, checkpoint=fl.ResumableCheckpoint("whole", **when), default_root_dir="whole")
    assert run(lambda: ending(Die()), checkpoint=fl.ResumableCheckpoint("ckpt", **when)) is None
    assert not Path("run/checkpoints/refitted.ckpt").exists()
    for _ in range(2):
        run(ending, ckpt_path="last", checkpoint=fl.ResumableCheckpoint("ckpt", **when))
        expected, found = (read_metrics(f"{name}/metrics.json") for name in ("whole", "run"))
        assert {key for key in expected if not key.startswith("time/")} <= found.keys()
        assert found["target/top1"] == expected["target/top1"]
        refitted = [
            torch.load(f"{name}/checkpoints/refitted.ckpt", weights_only=False)["state_dict"]
            for name in ("whole", "run")
        ]
        assert all(torch.equal(value, refitted[1][name]) for name, value in refitted[0].items())
        Path("run/checkpoints/refitted.ckpt").unlink()


class Poisoned(fl.ImageClassificationModule):
    """A loss, or the parameters after a step, that is no number."""

    def __init__(self, what, where):
        super().__init__("test_resnet.r160_in1k", 3, pretrained=False)
        self.what, self.where = what, where

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        here = self.training and self.trainer.global_step == self.where
        return losses * torch.nan if here and self.what == "loss" else losses

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.what == "parameter" and self.trainer.global_step == self.where:
            with torch.no_grad():
                self.head.bias[0] = torch.inf


@pytest.mark.parametrize("what", ["loss", "parameter"])
@pytest.mark.parametrize("where", [2, 5, 8])
def test_a_model_that_has_diverged_does_not_take_the_place_of_a_sound_checkpoint(what, where):
    pictures(Path("pictures"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        run(lambda: (Poisoned(what, where), *vision()[1:]))
    found = torch.load("ckpt/last.ckpt", weights_only=False)
    assert found["global_step"] == where
    assert all(torch.isfinite(value).all() for value in found["state_dict"].values())


def in_two_processes(make, after, ckpt_path) -> None:
    found = run(make, after, ckpt_path=ckpt_path, devices=2, strategy="ddp")
    if found is not None and os.environ["RANK"] == "0":
        torch.save({"weights": found[0], "parameters": found[1]}, "done.pt")


@pytest.mark.parametrize(("make", "after"), [(vision, 2), (language, 5)])
def test_two_processes_are_resumed(make, after, tmp_path):
    pictures(Path("pictures"))
    launch(in_two_processes, make, None, None)
    expected = torch.load("done.pt", weights_only=True)
    Path("ckpt/last.ckpt").unlink()
    Path("done.pt").unlink()
    launch(in_two_processes, make, after, None)
    assert Path("ckpt/last.ckpt").exists() and not Path("done.pt").exists()
    launch(in_two_processes, make, None, "last")
    found = torch.load("done.pt", weights_only=True)
    assert_equal((found["weights"], found["parameters"]), (expected["weights"], expected["parameters"]))


def main(folder: str, make, place: str = "", call: int = 0, share: float = 0.0) -> None:
    """The run that is killed in the given call of a place; goes on from its last checkpoint, if it has one."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sweep_module._SECONDS_PER_BLOCK = 0.0
    for name, (owner, attribute) in CALLS.items():
        setattr(owner, attribute, killing(getattr(owner, attribute), name, call * (name == place), share))
    os.replace = killing_writes(os.replace, place, call, share)
    found = run(make, ckpt_path="last")
    torch.save({"weights": found[0], "parameters": found[1]}, "done.pt")


#: None of these is in the key of the cache, which would change with the call to die in.
CALLS = {
    "scoring": (sweep_module, "score_batch"),
    "probing": (torch.optim.LBFGS, "step"),
    "training": (SingleDeviceStrategy, "training_step"),
}
WRITES = {"weights": "flow_weights.safetensors", "checkpoint": "last.ckpt"}


def log(name: str) -> int:
    """Write down a call and return how many there were in this process."""
    with open("calls", "a") as file:
        file.write(f"{name}\n")
    counts[name] += 1
    return counts[name]


counts: Counter[str] = Counter()


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
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLOW_LIGHTNING_CACHE": "", "OMP_NUM_THREADS": "1"}
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
        pictures(tmp_path / folder / "pictures", count=40)
    assert started(tmp_path / "whole", make) == 0
    expected = torch.load("whole/done.pt", weights_only=True)
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
        found = torch.load(f"{folder}/done.pt", weights_only=True)
        assert_equal((found["weights"], found["parameters"]), (expected["weights"], expected["parameters"]))
        calls = Counter(Path(folder, "calls").read_text().split())
        assert calls["scoring"] <= whole["scoring"] + 1  # none twice but the one that it died in
        assert calls["training"] <= whole["training"] + 2 and calls["weights"] >= 2
        assert {path.name for path in Path(folder, "ckpt").glob(".*")} <= {".flow_lightning.lock"}
