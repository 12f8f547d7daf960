"""FSDP2 on two processes: a model in shards has the weights and the steps of a whole one."""

import os
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import flow_lightning as fl
from flow_lightning.distributed import data_rank, from_rank_zero, on_rank_zero
from flow_lightning.resume import ResumableDataLoader, ResumableSampler
from flow_lightning.trainer import FlowTrainer
from tests.examples import LinearRegression, RegressionData, fit, regression_data, slow
from tests.images import tiny_module
from tests.language import language_data, language_module
from tests.processes import launch
from tests.shards import InOrder, PicturesInOrder, Record, assert_same_parameters, record_of


class Regression(LinearRegression):
    """A user's own module, in shards by the user's own hand; without dropout, and each sample for itself."""

    def __init__(self):
        super().__init__()
        self.body[1].eval()
        self.body[2].p = 0.0

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (self.body, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class RegressionInOrder(InOrder, RegressionData):
    pass


SETTINGS = {"max_steps": 2, "use_distributed_sampler": False}


def regression(callback, **settings):
    data = RegressionInOrder(regression_data(21), batch_size=8)
    fit(callback, module=Regression(), data=data, **SETTINGS, **settings)


def pictures(callback, **settings):
    module, data = tiny_module("test_vit.r160_in1k"), PicturesInOrder(n=21)
    fit(fl.LinearProbeCallback(refit=False), callback, module=module, data=data, **SETTINGS, **settings)


def language(callback, tune="full", devices=1, **settings):
    module = language_module(tune=tune, learning_rate=1e-3, schedule="constant", warmup=0.0)
    data = language_data(Path.cwd(), 11, batch_size=4 // devices, tokens_per_batch=150, seed=0)
    fit(callback, module=module, data=data, max_steps=2, devices=devices, **settings)


lora = partial(language, tune="lora")
FILE = Path("weights/w.safetensors")


def in_shards(function, per="sample", size=(2, 1)):
    strategy = ModelParallelStrategy(*size, save_distributed_checkpoint=False)
    function(Record(per=per, weights_file=FILE), devices=2, strategy=strategy)


@pytest.mark.parametrize(
    ("function", "per", "tolerance", "size", "again"),
    [
        (regression, "sample", 1e-6, (2, 1), False),
        slow(regression, "sample", 1e-6, (1, 2), False),  # both processes hold all, and take the same samples
        slow(pictures, "sample", 1e-5, (2, 1), True),
        slow(language, "sample", 1e-6, (2, 1), False),
        slow(lora, "token", 1e-6, (2, 1), True),
    ],
)
def test_a_model_in_shards_has_the_weights_and_the_steps_of_a_whole_one(function, per, tolerance, size, again):
    """If it fits again, it believes the weights file."""
    function(Record(per=per))
    expected = record_of(0)
    launch(in_shards, function, per, size)
    found = record_of(0)
    assert not expected["in_shards"] and found["in_shards"]
    assert found["held"] <= 1.15 * expected["held"] / size[0]  # an odd number of rows is not halved
    assert torch.equal(found["weights"], record_of(1)["weights"])
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-7)
    assert_same_parameters(found, expected, rtol=1e-4, atol=tolerance)
    written = FILE.stat().st_mtime_ns
    if again:
        launch(in_shards, function, per, size)
    assert FILE.stat().st_mtime_ns == written and list(FILE.parent.iterdir()) == [FILE]
    assert torch.equal(record_of(1)["weights"], found["weights"])


def test_a_weights_file_is_not_believed_when_a_shard_has_changed(monkeypatch):
    launch(in_shards, regression)
    original = Regression.__init__
    for row in (0, -1):
        written = FILE.stat().st_mtime_ns

        def changed(self, row=row):
            original(self)
            with torch.no_grad():
                self.body[0].weight[row, 0] += 1e-3

        monkeypatch.setattr(Regression, "__init__", changed)
        launch(in_shards, regression)
        assert FILE.stat().st_mtime_ns > written


def interrupted(ckpt_path, dies_at=None):
    """Each process fits a model in shards, and dies while it writes its second checkpoint."""
    calls = Counter()

    def dying(function, name):
        def wrapped(*args, **kwargs):
            calls[name] += 1
            if dies_at == (name, calls[name]):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    torch.save = dying(torch.save, "meta")
    Path.rename = dying(Path.rename, "rename")
    checkpoint = ModelCheckpoint("ckpt", every_n_train_steps=1, save_last=True, save_top_k=0)
    settings = SETTINGS | {"max_steps": 3, "devices": 2, "enable_checkpointing": True, "make": FlowTrainer}
    data, strategy = Resumable(regression_data(40)), ModelParallelStrategy(2, 1)  # a part from each process
    callbacks = Record(), checkpoint, fl.ExactResumeCallback()
    fit(*callbacks, module=Regression(), data=data, ckpt_path=ckpt_path, strategy=strategy, **settings)


class Resumable(RegressionData):
    def train_dataloader(self):
        rank, world = data_rank(self.trainer)
        return ResumableDataLoader(self.dataset, batch_size=4, sampler=ResumableSampler(self.dataset, world, rank))


@pytest.mark.parametrize("death", [*map(slow, [("meta", 1), ("meta", 2)]), ("rename", 3)], ids=str)
def test_a_checkpoint_of_shards_is_the_old_or_the_new_one(death):
    """A run that is killed while it writes one ends as the unbroken run.

    The first checkpoint is written with 1 rename, the second with 2: the old one away, the new one to its place.
    """
    launch(interrupted, None)
    expected = record_of(0)
    shutil.rmtree("ckpt")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        launch(interrupted, None, death)
    launch(interrupted, "last")
    assert torch.equal(record_of(0)["weights"], expected["weights"])
    assert_same_parameters(record_of(0), expected)
    assert [path.name for path in Path("ckpt").iterdir()] == ["last.ckpt"]


class OnRankZero(Callback):
    """Rank 0 returns something, then fails at something."""

    def on_fit_start(self, trainer, pl_module):
        rank = trainer.global_rank
        found = [on_rank_zero(trainer, lambda: 5), from_rank_zero(trainer, lambda: {"rank": rank})]
        try:
            on_rank_zero(trainer, self.fail)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        torch.save(found, f"found{rank}.pt")

    def fail(self):
        raise ValueError("the disk is on fire")


def test_what_fails_on_rank_0_fails_on_every_rank():
    fit(OnRankZero(), devices=2, strategy="ddp_fork", max_steps=1)
    found = [record_of(rank) for rank in (0, 1)]
    assert found[0] == [5, {"rank": 0}, "ValueError: the disk is on fire"]
    assert found[1] == [None, {"rank": 0}, "RuntimeError: Rank 0 failed: ValueError: the disk is on fire"]
