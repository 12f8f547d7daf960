"""One run in a directory at a time; what rank 0 does alone, or fails to do."""

from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

import flow_lightning as fl
from flow_lightning.files import lock_folder, unlock
from flow_lightning.report.metrics import read_metrics, write_metrics
from flow_lightning.run import from_rank_zero, on_rank_zero
from tests.examples import LinearRegression, RegressionData, fit
from tests.images import PictureData, tiny_module


@pytest.mark.parametrize("callback", [fl.FlowWeightingCallback, fl.LinearProbeCallback, fl.RetentionCallback])
@pytest.mark.parametrize("place", ["run", "checkpoints"])
def test_a_run_that_is_refused_has_touched_nothing(callback, place):
    write_metrics("run/metrics.json", {"flow/temperature": 1.0})
    Path("checkpoints").mkdir()
    lock = lock_folder(place)
    settings = {"module": tiny_module(), "data": PictureData(), "enable_checkpointing": True}
    checkpoint = ModelCheckpoint("checkpoints", save_last=True)
    with pytest.raises(OSError, match=rf"Another run is writing into .*{place}"):
        fit(callback(), checkpoint, **settings)
    assert read_metrics("run/metrics.json") == {"flow/temperature": 1.0}
    assert not list(Path("checkpoints").glob("*.ckpt"))
    unlock(lock)
    fit(callback(), checkpoint, **settings)
    assert Path("checkpoints/last.ckpt").exists()


def test_the_directory_is_free_again_though_loader_processes_live_on():
    class Kept(RegressionData):
        loader_of_its_own = None

        def train_dataloader(self):
            self.loader_of_its_own = self.loader_of_its_own or super().train_dataloader()
            return self.loader_of_its_own

    data = Kept(num_workers=1, persistent_workers=True)
    for _ in range(2):
        _, trainer = fit(fl.FlowWeightingCallback(cache=False), data=data)
        assert trainer.global_step == 6


def test_a_disk_without_room_for_a_checkpoint_stops_the_fit_before_scoring(monkeypatch):
    module = LinearRegression()
    module.body.append(torch.nn.Linear(3000, 1000))  # 12 MB
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**20}))
    with pytest.raises(OSError, match=r"checkpoints cannot take the 11 MiB"):
        fit(fl.FlowWeightingCallback(), ModelCheckpoint("checkpoints"), module=module, enable_checkpointing=True)
    assert module.scored == 0


def test_a_resumed_run_keeps_its_numbers():
    callbacks = [fl.LinearProbeCallback, fl.FlowWeightingCallback]
    checkpoint = {"dirpath": "checkpoints", "filename": "two", "every_n_train_steps": 2}
    settings = {"enable_checkpointing": True, "data": PictureData()}
    fit(*(make() for make in callbacks), ModelCheckpoint(**checkpoint), module=tiny_module(), max_steps=2, **settings)
    before = read_metrics("run/metrics.json")
    fit(
        *(make() for make in callbacks),
        ModelCheckpoint(**checkpoint),
        module=tiny_module(),
        max_steps=3,
        ckpt_path="checkpoints/two.ckpt",
        **settings,
    )
    assert read_metrics("run/metrics.json") == before and "probe/strength" in before


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


class Shared(DummyLogger):
    """Stands for loggers, such as Wandb's, whose runs share one folder."""

    def __init__(self, version):
        super().__init__()
        self._version = version

    save_dir, name = "all", "project"

    @property
    def version(self):
        return self._version


def test_runs_of_a_logger_with_one_folder_have_directories_of_their_own():
    for version, place in (("ab12", "ab12"), (3, "version_3")):
        fit(fl.FlowWeightingCallback(), logger=Shared(version))
        assert (Path("all/project") / place / "flow_weights.safetensors").exists()


def test_somebody_elses_metrics_stay():
    Path("run").mkdir()
    Path("run/metrics.json").write_text('{"accuracy": 0.5}')
    fit(fl.FlowWeightingCallback())
    assert read_metrics("run/metrics.json")["accuracy"] == 0.5
