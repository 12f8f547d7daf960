"""The real command line, in-process, on every shipped vision configuration: no network, tiny overrides."""

import csv
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from yaml import safe_load

import flow_lightning as fl
from flow_lightning.__main__ import main
from flow_lightning.data.catalogue import CATALOGUE
from flow_lightning.report.metrics import read_metrics
from tests.data.fake_datasets import CLASSES, MAKERS, accept_any_checksum, make_folder
from tests.examples import slow

ROOT = Path(__file__).parent.parent
VISION = sorted(path.stem for path in (ROOT / "configs" / "vision").glob("*.yaml"))
TINY = shlex.split("""
    --model.model=test_resnet.r160_in1k --model.pretrained=false
    --data.root=data --data.image_size=32 --data.batch_size=8 --data.num_workers=0
    --trainer.max_epochs=1 --trainer.limit_train_batches=1 --trainer.limit_val_batches=1 --trainer.accelerator=cpu
    --trainer.num_sanity_val_steps=0 --trainer.enable_progress_bar=false --trainer.enable_model_summary=false
""")
#: The digits' configuration on a folder of 24 images for training and 12 for tests.
QUICK = ["-c=digits", *TINY, "--model.checkpoint=null", "--retention.images=null", "--data.dataset=folder"]
OWN = ["--model=tests.examples.LinearRegression", "--data=tests.examples.RegressionData", "--trainer.fast_dev_run=1"]
RATES = "--config={learning_rate: {standard: 0.02, flow: 0.01}}"


@pytest.fixture
def folder():
    make_folder(Path("data"))


def error_of(capsys, *arguments) -> str:
    """Run a command that must fail, and return its one line."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    line = error[error.index("error: ") :]
    assert len(line.splitlines()) == 1
    return line


def settings_of(config: str) -> dict:
    return safe_load((ROOT / "configs" / "vision" / f"{config}.yaml").read_text())


def metrics_of(cli) -> dict:
    return read_metrics(Path(cli.trainer.log_dir) / "metrics.json")


@pytest.mark.parametrize(("config", "method"), [("cifar10", "standard"), *(slow(config, "flow") for config in VISION)])
def test_every_configuration_composes_with_the_methods(config, method, monkeypatch):
    accept_any_checksum(monkeypatch)
    settings = settings_of(config)
    MAKERS[settings["data"]["init_args"]["dataset"]](Path("data"))
    cli = main(["fit", f"-c={config}", f"--method={method}", *TINY])
    metrics = metrics_of(cli)
    flow = any(isinstance(callback, fl.FlowWeightingCallback) for callback in cli.trainer.callbacks)
    assert flow == (method == "flow") == ("flow/temperature" in metrics) == ("time/refit_s" in metrics)
    assert 0 <= metrics["target/top1"] <= 1 and 0 <= metrics["target/hard_top1"] <= 1
    assert cli.model.learning_rate == settings["learning_rate"][method]
    assert cli.model.head.out_features == CATALOGUE[cli.datamodule.dataset].num_classes


def test_the_console_script_ends_without_an_error(monkeypatch):
    (script,) = entry_points(group="console_scripts", name="flow-lightning")
    monkeypatch.setattr(sys, "argv", ["flow-lightning", "fit", "--method=standard", *OWN])
    assert script.load()() is None  # `sys.exit` gets it


#: Of the paper: rates of plain fine-tuning and of FLOW, and epochs.
PAPER = [("cifar10", 0.005, 0.001, 20), ("cifar100", 0.01, 0.005, 25), ("flowers102", 0.05, 0.05, 25)]
PAPER += [("caltech101", 0.005, 0.01, 30), ("stanford_dogs", 0.001, 0.005, 30), ("stanford_cars", 0.05, 0.01, 30)]


@pytest.mark.parametrize(("config", "standard", "flow", "epochs"), PAPER)
def test_the_configurations_hold_the_papers_hyperparameters(config, standard, flow, epochs):
    settings = settings_of(config)
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    assert settings["learning_rate"] == {"standard": standard, "flow": flow, "recommended": 0.0003}
    assert settings["trainer"]["max_epochs"] == epochs and settings["seed_everything"] == 42
    assert (data["batch_size"], data["validation_fraction"]) == (128, 0)
    assert model["optimizer"]["init_args"] == {"momentum": 0.9, "weight_decay": 5e-4}
    assert (model["model"], model["batch_norm"]) == ("resnet18.a1_in1k", "train")


PLAIN = "standard (plain fine-tuning, without weights)"


@pytest.mark.parametrize(
    ("options", "method", "rate"),
    [
        ([], PLAIN, 0.1),  # the model's own
        ([RATES], PLAIN, 0.02),
        ([RATES, "--method=flow"], "flow", 0.01),
        ([RATES, "--method=flow", "--learning_rate=0.25"], "flow", 0.25),
        ([RATES, "--method=flow", "--model.learning_rate=0.25"], "flow", 0.25),
    ],
)
def test_a_fit_says_by_which_method_and_rate_it_trains(options, method, rate, caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert main(["fit", *OWN, *options]).model.learning_rate == rate
    assert f"Method: {method}, learning rate {rate}." in caplog.messages


def test_score_computes_weights_without_training_and_they_serve_a_fit(folder, caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        cli = main(["score", *QUICK])
    names = ("metrics.json", "flow_weights.safetensors", "flow_weights.png")
    assert f"Files in {cli.trainer.log_dir}: {', '.join(names)}\n" in caplog.text
    assert cli.trainer.global_step == 0 and "target/top1" not in metrics_of(cli)
    scored = Path(cli.trainer.log_dir).absolute() / "flow_weights.safetensors"
    weights = fl.SampleWeights.load(scored)
    losses = weights.losses.numpy().astype(np.float64)
    np.testing.assert_allclose(weights.weights.numpy(), np.exp(-losses / np.median(losses)), rtol=1e-4, atol=1e-30)
    assert len(weights) == 24 and scored.with_suffix(".png").exists()
    Path("method.yaml").write_text(
        "method: flow\ntrainer: {callbacks+: [{class_path: flow_lightning.FlowWeightingCallback, "
        f"init_args: {{weights_file: {scored}}}}}]}}\n"
    )
    cli = main(["fit", *QUICK, "-c=method.yaml"])
    assert metrics_of(cli)["flow/temperature"] == weights.temperature
    assert cli.model.head.out_features == len(CLASSES)  # as the folder says


@pytest.mark.parametrize(("option", "left"), [("--drop-issues", 21), ("--drop-issues=", 21), ("--relabel", 22)])
def test_one_argument_takes_the_table_of_an_earlier_run(option, left, folder):
    Path("mine.csv").write_text("index,is_label_issue,action\n0,True,\n5,False,drop\n7,False,drop\n9,True,keep\n")
    words = [f"{option}mine.csv"] if option.endswith("=") else [option, "mine.csv"]
    cli = main(["score", *QUICK, *words])
    assert len(fl.SampleWeights.load(Path(cli.trainer.log_dir) / "flow_weights.safetensors")) == left
    assert metrics_of(cli)["edits/dropped"] == 24 - left


def test_a_run_goes_on_from_its_last_checkpoint(folder):
    """The command of configs/README.md: the same for the first run and for those after it."""
    options = [*QUICK, "--method=flow", "-c=resumable", "--trainer.callbacks.dirpath=one"]
    options += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.limit_train_batches=3", "--ckpt_path=last"]
    first = main(["fit", *options, "--trainer.max_steps=2"])
    assert first.trainer.global_step == 2 and Path("one/last.ckpt").exists()
    assert isinstance(first.trainer.strategy.checkpoint_io, fl.AtomicCheckpointIO)
    second = main(["fit", *options])
    assert second.trainer.global_step == 3
    assert (Path(second.trainer.log_dir) / "checkpoints" / "epoch=0-step=3.ckpt").exists()
    flow = [
        next(c for c in cli.trainer.callbacks if isinstance(c, fl.FlowWeightingCallback)) for cli in (first, second)
    ]
    assert (flow[0].weights.weights == flow[1].weights.weights).all()
    assert flow[1].run.resumed and not flow[0].run.resumed


@pytest.mark.parametrize(("command", "metric"), [("validate", "val/top1"), ("test", "test/top1")])
def test_validate_and_test_measure(command, metric, folder):
    with pytest.warns(UserWarning, match="no --ckpt_path, so it takes the model as it is before training"):
        cli = main([command, *QUICK, "--data.validation_fraction=0.2"])
    assert cli.trainer.global_step == 0 and 0 <= cli.trainer.callback_metrics[metric] <= 1


def test_predict_writes_a_table(folder):
    main(["predict", *QUICK, "--trainer.logger=false", "--trainer.default_root_dir=run"])
    with open("run/predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(12))
    assert {row["name"] for row in rows} <= set(CLASSES)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.parametrize(
    ("words", "trainer", "message"),
    [
        ("validate", "max_epochs: 1", "no validation set. Set --data.validation_fraction"),
        ("fit", "callbacks: [{class_path: flow_lightning.FlowWeightingCallback}]", "trains without weights"),
        ("fit --method=flow", "callbacks: []", "Write `callbacks+:` there"),
    ],
)
def test_what_cannot_be_meant_is_an_error(words, trainer, message, capsys, folder):
    Path("own.yaml").write_text(f"trainer: {{{trainer}}}\n")
    command, *method = words.split()
    assert message in error_of(capsys, command, *QUICK, *method, "-c=own.yaml")
