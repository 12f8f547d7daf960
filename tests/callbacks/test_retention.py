"""When RetentionCallback measures, where its numbers go, and what a resumed fit makes of them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import flow_lightning as fl
from flow_lightning.measures import (
    Answers,
    GeneralText,
    HarnessTasks,
    PretrainedImages,
    TargetAccuracy,
    TargetLoss,
    TargetTasks,
)
from flow_lightning.report.metrics import read_metrics
from tests.examples import LinearRegression, RegressionData, fit
from tests.images import PictureData, tiny_module
from tests.retention import SIZE, SizeOfHead, image_fit, labelled_images, language_fit, text_file, unlabelled_images

TWO = {"devices": 2, "strategy": "ddp_fork"}


class AtTrainEnd(Callback):
    """Remembers the state of a fit, or changes the model."""

    def __init__(self, change=None):
        self.change = change

    def on_train_end(self, trainer, pl_module):
        self.state = deepcopy(pl_module.state_dict())
        self.modes = [module.training for module in pl_module.modules()]
        self.rng = torch.get_rng_state()
        if self.change is not None:
            self.change(pl_module)


def regression_fit(*callbacks, **settings):
    return fit(*callbacks, data=RegressionData(), **({"max_epochs": 2} | settings))


def own(every_n_epochs=None):
    return fl.RetentionCallback(measures=[SizeOfHead()], every_n_epochs=every_n_epochs)


def test_it_does_not_matter_where_the_callback_stands():
    """Before training it finds the probe's head, in the end what every other callback left."""
    alone = fl.LinearProbeCallback()
    fit(alone, module=tiny_module(), data=PictureData(), default_root_dir="probe", max_epochs=0)
    for position in (0, 2):
        last = AtTrainEnd(lambda module: torch.nn.init.constant_(module.head.weight, 5.0))
        measure, callbacks = SizeOfHead(), [fl.LinearProbeCallback(refit=True), last]
        callbacks.insert(position, fl.RetentionCallback(measures=[measure]))
        fit(*callbacks, module=tiny_module(), data=PictureData())
        metrics = read_metrics("run/metrics.json")
        assert metrics["retention/before/size"] == alone.probe.head.weight.abs().max().item()
        assert metrics["retention/after/size"] == 5 and measure.measured == ["before", "after"]
        assert metrics["time/fit_s"] > metrics["time/refit_s"]


def test_missing_data_are_found_before_anything_is_scored():
    def score(batch):
        raise AssertionError("scored")

    module = tiny_module()
    module.sample_losses = score
    with pytest.raises(FileNotFoundError, match="absent"):
        fit(fl.FlowWeightingCallback(), fl.RetentionCallback(images="absent"), module=module, data=PictureData())


@pytest.mark.parametrize("kind", ["images", "text"])
def test_measuring_leaves_no_trace(tmp_path, kind):
    if kind == "images":
        run, measures = image_fit, [TargetAccuracy(), PretrainedImages(labelled_images(tmp_path), image_size=SIZE)]
    else:
        run, measures = language_fit, [TargetLoss(), Answers(max_new_tokens=3), GeneralText([text_file()])]
    plain, probe = AtTrainEnd(), AtTrainEnd()
    run(plain)
    module, _ = run(probe, fl.RetentionCallback(measures=measures, every_n_epochs=1))
    assert torch.equal(torch.get_rng_state(), probe.rng) and torch.equal(plain.rng, probe.rng)
    assert [submodule.training for submodule in module.modules()] == probe.modes == plain.modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, probe.state[name]) and torch.equal(value, plain.state[name]), name


def test_epochs_are_measured_and_logged(tmp_path):
    images = PretrainedImages(labelled_images(tmp_path), image_size=SIZE)
    callback = fl.RetentionCallback(measures=[images, TargetAccuracy()], every_n_epochs=1)
    image_fit(callback, logger=CSVLogger(tmp_path, name="", version="run"))
    metrics = read_metrics("run/metrics.json")
    course = metrics["retention/epochs"]
    assert [(entry["epoch"], entry["step"]) for entry in course] == [(1, 3), (2, 6)]
    assert course[-1]["top1"] == metrics["retention/after/top1"]
    assert course[-1]["top1_original_bn"] == metrics["retention/after/top1_original_bn"]
    logged = Path("run/metrics.csv").read_text()
    assert "retention/epoch/top1" in logged and "retention/after/top1" in logged and "target/epoch" not in logged


@pytest.mark.parametrize("settings", [{}, TWO])
def test_checkpoints_are_chosen_and_training_stops_by_what_was_kept(settings):
    best = ModelCheckpoint("kept", "{epoch}", monitor="retention/epoch/size", mode="max")
    # No change is as large as 100, so patience ends with the fourth epoch.
    stop = EarlyStopping("retention/epoch/size", min_delta=100.0, patience=3)
    regression_fit(own(every_n_epochs=1), best, stop, max_epochs=9, enable_checkpointing=True, **settings)
    sizes = [entry["size"] for entry in read_metrics("run/metrics.json")["retention/epochs"]]
    assert len(sizes) == len(set(sizes)) == 4
    assert [path.name for path in Path("kept").iterdir()] == [f"epoch={sizes.index(max(sizes))}.ckpt"]


def test_all_numbers_are_in_the_metrics_of_the_trainer():
    _, trainer = regression_fit(own(every_n_epochs=2), max_epochs=4)
    metrics = read_metrics("run/metrics.json")
    assert [entry["epoch"] for entry in metrics["retention/epochs"]] == [2, 4]
    numbers = {key: value for key, value in metrics.items() if key != "retention/epochs"}
    values = {key: value.item() for key, value in trainer.callback_metrics.items()}
    assert {key: values[key] for key in numbers} == pytest.approx(numbers)
    assert values["retention/epoch/size"] == pytest.approx(metrics["retention/epochs"][-1]["size"])


def test_the_table_is_narrow_and_its_last_line_names_the_files(tmp_path, capsys, rendered):
    image_fit(fl.RetentionCallback(images=labelled_images(tmp_path)), max_epochs=1)
    *table, last = capsys.readouterr().out.strip().splitlines()
    table = table[table.index(next(line for line in table if "What was learned" in line)) :]
    assert max(map(len, table)) <= 80 and any("pre-trained task before training" in line for line in table)
    assert last == "Files in run: metrics.json, retention.png"
    assert Path("run/retention.png").read_bytes()[:4] == b"\x89PNG"


def test_a_fit_without_a_directory_leaves_no_files(tmp_path, capsys):
    _, trainer = regression_fit(own(), default_root_dir=None)
    assert not list(tmp_path.iterdir())
    assert "size of the head" in capsys.readouterr().out and "retention/after/size" in trainer.callback_metrics


def test_a_diverged_model_is_reported(capsys):
    class Diverged(SizeOfHead):
        def measure(self, trainer, module, when):
            return {"size": 1.0 if when == "before" else float("inf")}

    regression_fit(fl.RetentionCallback(measures=[Diverged()]))
    metrics = read_metrics("run/metrics.json")
    assert metrics["retention/before/size"] == 1 and metrics["retention/after/size"] is None
    assert "size of the head before training" in capsys.readouterr().out


@pytest.mark.parametrize("write", [labelled_images, unlabelled_images])
def test_a_resumed_fit_keeps_what_was_measured_before(tmp_path, write):
    path = write(tmp_path)

    def callback():
        measures = [TargetAccuracy(hard_fraction=0.4), PretrainedImages(path, image_size=SIZE)]
        return fl.RetentionCallback(measures=measures, every_n_epochs=1)

    first, resumed = callback(), callback()
    image_fit(first, ModelCheckpoint("c", "{epoch}", save_top_k=-1), enable_checkpointing=True)
    torch.load("c/epoch=0.ckpt", weights_only=True)
    image_fit(resumed, ckpt_path="c/epoch=0.ckpt", default_root_dir="other")
    assert resumed.before == first.before  # the seconds it took included: not measured again
    assert [entry["epoch"] for entry in resumed.epochs] == [1, 2]
    one, two = (callback.state_dict()["measures"] for callback in (first, resumed))
    assert torch.equal(two["TargetAccuracy"]["hard"], one["TargetAccuracy"]["hard"])
    if write is unlabelled_images:
        assert torch.equal(two["PretrainedImages"]["reference"], one["PretrainedImages"]["reference"])
    metrics = read_metrics("other/metrics.json")
    assert "target/before/top1" in metrics and len(metrics["retention/epochs"]) == 2


def test_a_resumed_fit_with_other_data_or_measures_is_refused(tmp_path):
    path = unlabelled_images(tmp_path)
    image_fit(own(), ModelCheckpoint("c", "{epoch}", save_top_k=-1), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"target/samples was not measured before training, but is 9 now"):
        image_fit(fl.RetentionCallback(images=path), ckpt_path="c/epoch=0.ckpt")
    image_fit(fl.RetentionCallback(images=path), ModelCheckpoint("d", "{epoch}"), enable_checkpointing=True)
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"retention/samples was 7 .* but is 6 now"):
        image_fit(fl.RetentionCallback(images=path), ckpt_path="d/epoch=1.ckpt", max_epochs=3)


def test_a_checkpoint_without_measurement_is_named(tmp_path):
    image_fit(ModelCheckpoint("c", "{epoch}", save_top_k=-1), enable_checkpointing=True)
    path = labelled_images(tmp_path)
    for images in (path, str(tmp_path / "images")):
        with pytest.warns(UserWarning, match="written without RetentionCallback"):
            image_fit(fl.RetentionCallback(images=images), ckpt_path="c/epoch=0.ckpt")
        metrics = read_metrics("run/metrics.json")
        assert ("retention/after/top1" in metrics) == (images == path)  # agreement with what? that model is gone
        assert metrics["target/samples"] == 9 and not any("/before/" in key for key in metrics)
        Path("run/metrics.json").unlink()


def test_a_second_fit_of_the_same_callback_measures_anew():
    callback, before = own(), []
    for seed in (0, 1):
        regression_fit(callback, module=LinearRegression(seed=seed))
        before.append(callback.before["retention/before/size"])
    assert before[0] != before[1]


def test_by_default_what_the_module_learned_is_measured():
    image_fit(fl.RetentionCallback(), max_epochs=1)
    assert "target/top1" in read_metrics("run/metrics.json")
    language_fit(fl.RetentionCallback(), max_epochs=1, default_root_dir="text")
    assert "target/loss" in read_metrics("text/metrics.json")


def test_a_configuration_can_give_the_measures():
    parser = ArgumentParser()
    parser.add_class_arguments(fl.RetentionCallback, "retention")
    kinds = {
        PretrainedImages: {"images": "packaged"},
        GeneralText: {"texts": ["packaged"]},
        HarnessTasks: {"tasks": {"commonsense": ["piqa", "hellaswag"], "mmlu": ["mmlu:5"]}},
        TargetTasks: {"tasks": ["gsm8k:5"]},
        Answers: {"max_new_tokens": 64},
        TargetLoss: {},
    }
    paths = {kind: f"flow_lightning.measures.{kind.__name__}" for kind in kinds}
    measures = [{"class_path": paths[kind], "init_args": arguments} for kind, arguments in kinds.items()]
    config = parser.parse_object({"retention": {"measures": measures, "images": "packaged"}})
    callback = parser.instantiate(config).retention
    assert [type(measure) for measure in callback.measures] == [*kinds]
    assert callback.images == "packaged" and callback.measures[1].texts == ["packaged"]


def test_two_measures_of_one_class_and_no_epochs_are_refused():
    with pytest.raises(ValueError, match=r"measures has \['PretrainedImages'\] more than once"):
        image_fit(fl.RetentionCallback(measures=[PretrainedImages("a")], images="b"))
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        fl.RetentionCallback(every_n_epochs=0)
