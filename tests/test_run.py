"""The directory and the numbers of a run."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

import flow_lightning as fl
from flow_lightning import distributed
from flow_lightning.report.metrics import read_metrics, write_metrics
from tests.examples import fit
from tests.images import PictureData, tiny_module


def two_steps(max_steps, **settings):
    callbacks = fl.LinearProbeCallback(refit=False), fl.FlowWeightingCallback()
    checkpoint = ModelCheckpoint("checkpoints", "two", every_n_train_steps=2)
    settings = {"module": tiny_module(), "data": PictureData(), "enable_checkpointing": True} | settings
    fit(*callbacks, checkpoint, max_steps=max_steps, **settings)
    return read_metrics("run/metrics.json")


def test_a_resumed_run_keeps_its_numbers():
    before = two_steps(2)
    assert two_steps(3, ckpt_path="checkpoints/two.ckpt") == before and "probe/strength" in before


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


def test_numbers_reach_the_trainer_and_those_of_an_older_run_in_the_same_directory_are_forgotten():
    write_metrics("run/metrics.json", {"target/top1": 0.5})
    flow = fl.FlowWeightingCallback()
    _, trainer = fit(flow)
    metrics = read_metrics("run/metrics.json")
    assert "target/top1" not in metrics and metrics["flow/temperature"] == flow.weights.temperature
    assert float(trainer.callback_metrics["flow/temperature"]) == pytest.approx(flow.weights.temperature)


@pytest.mark.parametrize("settings", [{"default_root_dir": None}, {"fast_dev_run": True, "logger": None}])
def test_a_run_without_a_place_of_its_own_leaves_no_file(settings):
    flow = fl.FlowWeightingCallback()
    fit(flow, fl.ExactResumeCallback(), **settings)
    assert flow.weights.lookups > 0 and list(Path().iterdir()) == []


def test_a_second_fit_is_another_run():
    first, second = fl.FlowWeightingCallback(), fl.FlowWeightingCallback()
    module, _ = fit(first)
    assert "flow_run" not in vars(module)
    fit(second, module=module, default_root_dir="other")
    assert first.run is not second.run and Path("other/metrics.json").exists()


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_hide_parameters_are_refused_before_anything_is_computed(strategy, monkeypatch):
    kind = type(strategy, (SingleDeviceStrategy,), {})
    monkeypatch.setattr(distributed, strategy, kind)
    with pytest.raises(TypeError, match=f"{strategy} is not supported.*ModelParallelStrategy"):
        fit(fl.FlowWeightingCallback(), strategy=kind("cpu"))
