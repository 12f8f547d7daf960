"""FSDP2 on two processes: a model in shards has the weights and the steps of a whole one."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, model_parallel
from torch.distributed.fsdp import fully_shard

import flow_lightning as fl
from flow_lightning.distributed import data_rank, from_rank_zero, on_rank_zero
from flow_lightning.resume import ResumableDataLoader, ResumableSampler
from flow_lightning.trainer import FlowTrainer
from tests.examples import LinearRegression, RegressionData, fit, make_trainer, regression_data
from tests.images import tiny_module
from tests.language import language_data, language_module
from tests.processes import launch
from tests.shards import InOrder, PicturesInOrder, Record


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


def regression(callback, **settings):
    data = RegressionInOrder(regression_data(21), batch_size=8)
    fit(callback, module=Regression(), data=data, max_steps=2, use_distributed_sampler=False, **settings)


def pictures(callback, **settings):
    module, data = tiny_module("test_vit.r160_in1k"), PicturesInOrder(n=21)
    fit(
        fl.LinearProbeCallback(refit=False),
        callback,
        module=module,
        data=data,
        max_steps=2,
        use_distributed_sampler=False,
        **settings,
    )


def language(callback, tune="full", devices=1, **settings):
    module = language_module(tune=tune, learning_rate=1e-3, schedule="constant", warmup=0.0)
    data = language_data(Path.cwd(), 11, batch_size=4 // devices, tokens_per_batch=150)
    fit(callback, module=module, data=data, max_steps=2, devices=devices, **settings)


def lora(callback, **settings):
    language(callback, tune="lora", **settings)


def in_shards(function, per, size, **settings):
    strategy = ModelParallelStrategy(*size, save_distributed_checkpoint=False)
    function(Record(per=per, **settings), devices=2, strategy=strategy)


@pytest.mark.parametrize(
    ("function", "per", "tolerance", "size"),
    [
        (regression, "sample", 1e-6, (2, 1)),
        (regression, "sample", 1e-6, (1, 2)),  # both processes hold all, and take the same samples
        (pictures, "sample", 1e-5, (2, 1)),
        (language, "sample", 1e-6, (2, 1)),
        (language, "token", 1e-6, (2, 1)),
        (lora, "token", 1e-6, (2, 1)),
    ],
)
def test_a_model_in_shards_has_the_weights_and_the_steps_of_a_whole_one(function, per, tolerance, size):
    function(Record(per=per))
    expected = torch.load("found0.pt", weights_only=True)
    launch(in_shards, function, per, size)
    found = [torch.load(f"found{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not expected["in_shards"] and found[0]["in_shards"]
    assert found[0]["held"] <= 1.15 * expected["held"] / size[0]  # an odd number of rows is not halved
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-5, atol=1e-7)
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found[0]["parameters"][name], value, rtol=1e-4, atol=tolerance, msg=name)


FILE = "weights/w.safetensors"


def with_file(function, per="sample"):
    """Fit in shards with a weights file; return when the file was written."""
    launch(in_shards_with_file, function, per)
    assert [path.name for path in Path("weights").iterdir()] == ["w.safetensors"]
    return Path(FILE).stat().st_mtime_ns


def in_shards_with_file(function, per):
    in_shards(function, per, (2, 1), weights_file=FILE)


@pytest.mark.parametrize(
    ("function", "per"), [(regression, "sample"), (pictures, "sample"), (language, "token"), (lora, "sample")]
)
def test_a_weights_file_of_a_model_in_shards_is_believed(function, per):
    first = with_file(function, per)
    weights = torch.load("found0.pt", weights_only=True)["weights"]
    assert with_file(function, per) == first
    assert torch.equal(torch.load("found1.pt", weights_only=True)["weights"], weights)


@pytest.mark.parametrize("row", [0, -1])
def test_a_change_in_any_shard_is_noticed(row, monkeypatch):
    first = with_file(regression)
    original = Regression.__init__

    def changed(self):
        original(self)
        with torch.no_grad():
            self.body[0].weight[row, 0] += 1e-3

    monkeypatch.setattr(Regression, "__init__", changed)
    assert with_file(regression) > first


def resumed(ckpt_path, max_epochs):
    """Each process fits a model in shards, and writes a checkpoint at the end of each epoch."""
    checkpoint = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    module, flow = Regression(), Record()
    strategy = ModelParallelStrategy(2, 1)  # a checkpoint is a folder, with a part from each process
    data = RegressionInOrder(regression_data(21), batch_size=8)
    settings = {"enable_checkpointing": True, "max_epochs": max_epochs, "devices": 2, "use_distributed_sampler": False}
    fit(flow, checkpoint, module=module, data=data, strategy=strategy, ckpt_path=ckpt_path, **settings)


def test_a_model_in_shards_resumes_with_the_weights_of_its_checkpoint():
    """Its checkpoint is restored after on_fit_start only."""
    launch(resumed, None, 2)
    unbroken = torch.load("found0.pt", weights_only=True)
    launch(resumed, "ckpt/epoch=0.ckpt", 2)
    found = torch.load("found0.pt", weights_only=True)
    assert torch.equal(found["weights"], unbroken["weights"])
    for name, value in unbroken["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=0, msg=name)


STEPS = {"every_n_train_steps": 1, "save_last": True, "save_top_k": 0}


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

    model_parallel._distributed_checkpoint_save = dying(model_parallel._distributed_checkpoint_save, "shards")
    torch.save = dying(torch.save, "meta")
    Path.rename = dying(Path.rename, "rename")
    shutil.rmtree = dying(shutil.rmtree, "rmtree")
    flow, checkpoint = Record(), ModelCheckpoint("ckpt", **STEPS)
    trainer = make_trainer(
        *(flow, checkpoint, fl.ExactResumeCallback()),
        make=FlowTrainer,
        strategy=ModelParallelStrategy(2, 1),
        devices=2,
        max_steps=5,
        enable_checkpointing=True,
        use_distributed_sampler=False,
    )
    seed_everything(7, verbose=False)
    trainer.fit(Regression(), datamodule=Resumable(regression_data(40)), ckpt_path=ckpt_path)


class Resumable(RegressionData):
    def train_dataloader(self):
        rank, world = data_rank(self.trainer)
        return ResumableDataLoader(self.dataset, batch_size=4, sampler=ResumableSampler(self.dataset, world, rank))


#: The first checkpoint is written with 1 rename, the second with 2: the old one away, the new one to its place.
DEATHS = [("meta", 1), ("shards", 2), ("meta", 2), ("rename", 3)]


@pytest.mark.parametrize("death", DEATHS)
def test_a_checkpoint_of_shards_is_the_old_or_the_new_one(death):
    launch(interrupted, None)
    expected = torch.load("found0.pt", weights_only=True)
    shutil.rmtree("ckpt")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        launch(interrupted, None, death)
    launch(interrupted, "last")
    found = torch.load("found0.pt", weights_only=True)
    assert torch.equal(found["weights"], expected["weights"])
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=0, msg=name)
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
    found = [torch.load(f"found{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found[0] == [5, {"rank": 0}, "ValueError: the disk is on fire"]
    assert found[1] == [None, {"rank": 0}, "RuntimeError: Rank 0 failed: ValueError: the disk is on fire"]
