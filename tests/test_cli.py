"""The real command line, in-process, on every shipped configuration: no network, tiny overrides."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from yaml import safe_load

import flow_lightning as fl
from flow_lightning.cli import learning_rate_of, main
from flow_lightning.data.catalogue import CATALOGUE
from tests.data.fake_datasets import MAKERS, accept_any_checksum

ROOT = Path(__file__).parent.parent
VISION = sorted((ROOT / "configs" / "vision").glob("*.yaml"))
TINY = [
    "--model.model=test_resnet.r160_in1k",
    "--model.pretrained=false",
    "--data.root=data",
    "--data.image_size=32",
    "--data.batch_size=8",
    "--data.num_workers=0",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
QUICK = [
    "-c=quickstart",
    "--model.checkpoint=null",
    "--retention.images=null",
    *(option for option in TINY if "root" not in option),
]

FOLDER = ["--data.dataset=folder", "--data.root=data"]  # 24 images
OWN = ["--model=tests.examples.LinearRegression", "--data=tests.examples.RegressionData", "--trainer.fast_dev_run=1"]
RATES = "--config={learning_rate: {standard: 0.02, flow: 0.01}}"


@pytest.fixture
def fake_data(monkeypatch):
    accept_any_checksum(monkeypatch)

    def make(dataset: str) -> None:
        Path("data").mkdir()
        MAKERS[dataset](Path("data"))

    return make


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


def metrics_of(cli) -> dict:
    return json.loads((Path(cli.trainer.log_dir) / "metrics.json").read_text())


@pytest.mark.parametrize("config", VISION, ids=lambda path: path.stem)
def test_every_configuration_composes_with_every_method(config, fake_data):
    settings = safe_load(config.read_text())
    fake_data(settings["data"]["init_args"]["dataset"])
    for method in ("standard", "flow"):
        cli = main(["fit", f"-c={config.stem}", f"--method={method}", *TINY])
        metrics = metrics_of(cli)
        flow = any(isinstance(callback, fl.FlowWeightingCallback) for callback in cli.trainer.callbacks)
        assert flow == (method == "flow") == ("flow/temperature" in metrics)
        assert 0 <= metrics["target/top1"] <= 1 and 0 <= metrics["target/hard_top1"] <= 1
        assert ("time/refit_s" in metrics) == flow
        assert cli.model.learning_rate == settings["learning_rate"][method]
        assert cli.model.head.out_features == CATALOGUE[cli.datamodule.dataset].num_classes


@pytest.mark.parametrize(
    ("config", "standard", "flow", "epochs"),
    [
        ("cifar10", 0.005, 0.001, 20),
        ("cifar100", 0.01, 0.005, 25),
        ("flowers102", 0.05, 0.05, 25),
        ("caltech101", 0.005, 0.01, 30),
        ("stanford_dogs", 0.001, 0.005, 30),
        ("stanford_cars", 0.05, 0.01, 30),
    ],
)
def test_the_configurations_hold_the_papers_hyperparameters(config, standard, flow, epochs):
    settings = safe_load((ROOT / "configs" / "vision" / f"{config}.yaml").read_text())
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    assert settings["learning_rate"] == {"standard": standard, "flow": flow}
    assert settings["trainer"]["max_epochs"] == epochs and settings["seed_everything"] == 42
    assert (data["batch_size"], data["validation_fraction"]) == (128, 0)
    assert model["optimizer"]["init_args"] == {"momentum": 0.9, "weight_decay": 5e-4}
    assert (model["model"], model["batch_norm"]) == ("resnet18.a1_in1k", "train")


@pytest.mark.parametrize("option", ["--learning_rate=0.25", "--model.learning_rate=0.25"])
def test_one_learning_rate_on_the_command_line_holds_for_every_method(option):
    assert main(["fit", *OWN, RATES, "--method=flow", option]).model.learning_rate == 0.25


def test_rates_for_each_method_need_one_for_this_method():
    assert learning_rate_of({"flow": 0.1}, "flow", None) == 0.1
    with pytest.raises(ValueError, match="no rate for the method 'mine', only for flow"):
        learning_rate_of({"flow": 0.1}, "mine", None)


def test_a_model_keeps_its_own_rate_unless_one_is_given():
    assert main(["fit", *OWN]).model.learning_rate == 0.1
    assert main(["fit", *OWN, "--learning_rate=0.5"]).model.learning_rate == 0.5


def test_a_fit_without_a_method_trains_plainly_at_the_standard_rate_and_says_so(caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        cli = main(["fit", *OWN, RATES])
        assert cli.model.learning_rate == 0.02 and cli.model.sample_weights is None
        assert main(["fit", *OWN, RATES, "--method=flow"]).model.learning_rate == 0.01
    said = [message for message in caplog.messages if message.startswith("Method: ")]
    assert said == [
        "Method: standard (plain fine-tuning, without weights; see --method), learning rate 0.02.",
        "Method: flow, learning rate 0.01.",
    ]


@pytest.mark.parametrize(
    ("method", "callbacks", "message"),
    [
        ("standard", "[{class_path: flow_lightning.FlowWeightingCallback}]", "trains without weights"),
        ("flow", "[]", "there is no FlowWeightingCallback"),
    ],
)
def test_a_method_and_weights_that_do_not_agree_stop_the_fit(method, callbacks, message, capsys):
    Path("own.yaml").write_text(f"trainer: {{callbacks: {callbacks}}}\n")
    assert message in error_of(capsys, "fit", *QUICK, f"--method={method}", "-c=own.yaml")


def test_score_computes_weights_without_training(caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        cli = main(["score", *QUICK])
    assert f"Weights, picture and metrics.json: {cli.trainer.log_dir}" in caplog.text
    assert cli.trainer.global_step == 0
    folder = Path(cli.trainer.log_dir)
    weights = fl.SampleWeights.load(folder / "flow_weights.safetensors")
    losses = weights.losses.numpy().astype(np.float64)
    np.testing.assert_allclose(weights.weights.numpy(), np.exp(-losses / np.median(losses)), rtol=1e-4, atol=1e-30)
    assert len(weights) == 1198 and (folder / "flow_weights.png").exists()
    assert "target/top1" not in json.loads((folder / "metrics.json").read_text())


def test_weights_that_score_wrote_serve_a_fit(fake_data):
    fake_data("folder")
    scored = Path(main(["score", *QUICK, *FOLDER]).trainer.log_dir) / "flow_weights.safetensors"
    Path("method.yaml").write_text(
        "method: flow\ntrainer: {callbacks+: [{class_path: flow_lightning.FlowWeightingCallback, "
        f"init_args: {{weights_file: {scored.absolute()}}}}}]}}\n"
    )
    cli = main(["fit", *QUICK, *FOLDER, "-c=method.yaml"])
    assert metrics_of(cli)["flow/temperature"] == fl.SampleWeights.load(scored).temperature


def test_a_run_goes_on_from_its_last_checkpoint(fake_data):
    """The command of configs/README.md: the same for the first run and for those after it."""
    fake_data("folder")
    options = [*QUICK, *FOLDER, "--method=flow", "-c=resumable", "--trainer.callbacks.dirpath=one"]
    options += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.limit_train_batches=3", "--ckpt_path=last"]
    first = main(["fit", *options, "--trainer.max_steps=2"])
    assert first.trainer.global_step == 2 and Path("one/last.ckpt").exists()
    assert isinstance(first.trainer.strategy.checkpoint_io, fl.AtomicCheckpointIO)
    second = main(["fit", *options])
    assert second.trainer.global_step == 3
    flow = [
        next(c for c in cli.trainer.callbacks if isinstance(c, fl.FlowWeightingCallback)) for cli in (first, second)
    ]
    assert (flow[0].weights.weights == flow[1].weights.weights).all()
    assert flow[1].run.resumed and not flow[0].run.resumed


@pytest.mark.parametrize(("command", "metric"), [("validate", "val/top1"), ("test", "test/top1")])
def test_validate_and_test_measure(command, metric):
    """Though the quickstart leaves validation out of its fits."""
    options = [option for option in QUICK if "limit_val" not in option]
    with pytest.warns(UserWarning, match="no --ckpt_path, so it takes the model as it is before training"):
        cli = main([command, *options, "--trainer.limit_test_batches=1"])
    assert cli.trainer.global_step == 0 and 0 <= cli.trainer.callback_metrics[metric] <= 1


@pytest.mark.parametrize("processes", [[], ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]])
def test_predict_writes_a_table(processes):
    main(["predict", *QUICK, "--trainer.logger=false", "--trainer.default_root_dir=run", *processes])
    with open("run/predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(599))
    assert {row["name"] for row in rows} <= set("0123456789")
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_the_parsers_own_help_reads(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help-all"])
    assert end.value.code == 0 and "--retention.images" in capsys.readouterr().out


def test_a_folder_of_images_tells_the_number_of_classes(fake_data):
    fake_data("folder")
    cli = main(["fit", "-c=cifar10", "--method=flow", "--data.dataset=folder", *TINY])
    assert cli.model.head.out_features == 3


def test_missing_data_says_where_it_looked():
    with pytest.raises(FileNotFoundError, match=r"flowers-102.*download"):
        main(["fit", "-c=flowers102", *TINY])


BROKEN = {"section.yaml": "trainr: {max_epochs: 3}", "option.yaml": "model: {init_args: {num_clases: 3}}"}
BROKEN["class.yaml"] = "trainer: {callbacks+: [{class_path: flow_lightning.FlowWeightingCalback}]}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lerning_rate=3"], "'lerning_rate'. Did you mean learning_rate?"),
        (["--batch_size", "3"], "'batch_size'. Did you mean data.batch_size?"),
        (["-c=section.yaml"], "'trainr.max_epochs'. Did you mean trainer.max_epochs?"),
        (["-c=option.yaml"], "'num_clases'. Did you mean num_classes?"),
        (["-c=class.yaml"], "'FlowWeightingCalback'. Did you mean FlowWeightingCallback?"),
        (["--data.batchsize=3"], "'batchsize'. Did you mean batch_size?"),
        (["--model.batch_norm=frosen"], "model.batch_norm: 'frosen' is no valid value. Did you mean frozen?"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs: 'many' is no valid value. Expected int or null."),
        (["--retention.every_n_epochs=0"], "every_n_epochs is 0; expected at least 1"),
        (["--trainer.accelerator=abacus"], "invalid accelerator"),
        (["--data.dataset=digit"], "Did you mean digits"),
        (["--model.model=resnet1"], "timm has no model 'resnet1'"),
        (["--data.dataset=folder", "--data.root=nowhere"], "nowhere/train"),
        (["--learning_rate={flow: 0.1}"], "no rate for the method 'standard', only for flow"),
        (["--method=flo"], "Did you mean flow?"),
        (["-c=cifar"], "Did you mean cifar10?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_key_or_value_gives_a_short_message_with_the_nearest_right_one(options, message, capsys):
    for name, text in BROKEN.items():
        Path(name).write_text(text)
    error = error_of(capsys, "fit", *QUICK, *options)
    assert message in error and len(error.splitlines()) == 1 and error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fti"], "Did you mean fit?"), (["fit"], "fit needs a configuration"), ([], "must be a command")],
)
def test_a_command_and_a_configuration_are_needed(arguments, message, capsys):
    assert message in error_of(capsys, *arguments)
