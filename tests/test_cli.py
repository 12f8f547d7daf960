"""The real command line, in-process, on every shipped configuration: no network, tiny overrides."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from yaml import safe_load

import flow_lightning as fl
from flow_lightning.callbacks.linear_probe import LinearProbeCallback
from flow_lightning.cli import learning_rate_of, main
from tests.data.fake_datasets import MAKERS, accept_any_checksum

ROOT = Path(__file__).parent.parent
METHODS = [ROOT / "configs" / "methods" / f"{name}.yaml" for name in ("flow", "standard")]
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
    f"-c={ROOT}/configs/quickstart.yaml",
    "--model.checkpoint=null",
    "--retention.images=null",
    *(option for option in TINY if "root" not in option),
]


@pytest.fixture
def fake_data(monkeypatch):
    accept_any_checksum(monkeypatch)

    def make(dataset: str) -> None:
        Path("data").mkdir()
        MAKERS[dataset](Path("data"))

    return make


def metrics_of(cli) -> dict:
    return json.loads((Path(cli.trainer.log_dir) / "metrics.json").read_text())


def test_there_are_configurations():
    assert all(path.is_file() for path in METHODS) and len(VISION) == 14


@pytest.mark.parametrize("config", VISION, ids=lambda path: path.stem)
def test_every_configuration_composes_with_every_method(config, fake_data):
    """Those of ResNet-50 differ from those of ResNet-18 by the model's name alone, so there one method is enough."""
    methods = METHODS if config.stem.endswith("resnet18") else METHODS[:1]
    for method in methods:
        if not Path("data").exists():
            fake_data(safe_load(config.read_text())["data"]["init_args"]["dataset"])
        cli = main(["fit", f"-c={config}", f"-c={method}", *TINY])
        metrics = metrics_of(cli)
        flow = any(isinstance(callback, fl.FlowWeightingCallback) for callback in cli.trainer.callbacks)
        assert flow == (method.stem == "flow") == ("flow/temperature" in metrics)
        assert 0 <= metrics["target/top1"] <= 1 and 0 <= metrics["target/hard_top1"] <= 1
        assert ("time/refit_s" in metrics) == flow
        assert cli.model.learning_rate == safe_load(config.read_text())["learning_rate"][method.stem]


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
    for model in ("resnet18", "resnet50"):
        settings = safe_load((ROOT / "configs" / "vision" / f"{config}_{model}.yaml").read_text())
        assert settings["learning_rate"] == {"standard": standard, "flow": flow}
        assert settings["trainer"]["max_epochs"] == epochs and settings["seed_everything"] == 42
        assert settings["data"]["init_args"]["batch_size"] == 128
        assert settings["model"]["init_args"]["optimizer"]["init_args"] == {"momentum": 0.9, "weight_decay": 5e-4}
        assert settings["model"]["init_args"]["batch_norm"] == "train"


def test_one_learning_rate_on_the_command_line_holds_for_every_method():
    cli = main(["fit", *QUICK, f"-c={METHODS[0]}", "--learning_rate=0.25", "--trainer.fast_dev_run=1"])
    assert cli.model.learning_rate == 0.25
    assert learning_rate_of({"flow": 0.1}, "flow") == 0.1
    with pytest.raises(ValueError, match="no rate for the method 'mine'"):
        learning_rate_of({"flow": 0.1}, "mine")


def test_score_computes_weights_without_training():
    cli = main(["score", *QUICK])
    assert cli.trainer.global_step == 0
    folder = Path(cli.trainer.log_dir)
    weights = fl.SampleWeights.load(folder / "flow_weights.safetensors")
    losses = weights.losses.numpy().astype(np.float64)
    np.testing.assert_allclose(weights.weights.numpy(), np.exp(-losses / np.median(losses)), rtol=1e-4, atol=1e-30)
    assert len(weights) == 1198 and (folder / "flow_weights.png").exists()
    assert "target/top1" not in json.loads((folder / "metrics.json").read_text())


def test_weights_that_score_wrote_serve_a_fit():
    scored = Path(main(["score", *QUICK]).trainer.log_dir) / "flow_weights.safetensors"
    Path("method.yaml").write_text(
        "trainer: {callbacks+: [{class_path: flow_lightning.FlowWeightingCallback, "
        f"init_args: {{weights_file: {scored.absolute()}}}}}]}}\n"
    )
    cli = main(["fit", *QUICK, "-c=method.yaml"])
    assert metrics_of(cli)["flow/temperature"] == fl.SampleWeights.load(scored).temperature


def test_compare_puts_methods_and_seeds_side_by_side(capsys, fake_data):
    fake_data("folder")
    methods = ",".join(f'"{path}"' for path in METHODS)
    data = ["--data.dataset=folder", "--data.root=data"]
    main(["compare", *QUICK, *data, f"--methods=[{methods}]", "--seeds=[1,2]", "--output=runs/x"])
    runs = json.loads(Path("runs/x/comparison.json").read_text())
    assert {name: len(column) for name, column in runs.items()} == {"flow": 2, "standard": 2}
    assert Path("runs/x/comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in runs:
        for run, seed in zip(runs[name], (1, 2)):
            assert run == json.loads(next(Path(f"runs/x/{name}/seed-{seed}").rglob("metrics.json")).read_text())
    table = capsys.readouterr().out
    assert "flow" in table and "standard" in table and "±" in table


def test_compare_goes_on_after_a_run_that_diverged_and_fails_at_the_end(capsys):
    methods = ",".join(f'"{path}"' for path in METHODS)
    steps, rates = "--trainer.limit_train_batches=3", "--learning_rate={standard: 1e36, flow: 0.001}"
    with pytest.raises(FloatingPointError, match=r"leaves out(.|\n)*standard/seed-1: The training loss is NaN"):
        main(["compare", *QUICK, steps, rates, f"--methods=[{methods}]", "--seeds=[1]", "--output=runs/x"])
    runs = json.loads(Path("runs/x/comparison.json").read_text())
    assert runs["standard"] == [{}] and runs["flow"][0]["target/top1"] > 0
    assert "target accuracy" in capsys.readouterr().out


def test_a_run_goes_on_from_its_last_checkpoint():
    """The command of the README: the same for the first run and for those after it."""
    options = [*QUICK, f"-c={METHODS[0]}", f"-c={ROOT}/configs/resumable.yaml", "--trainer.callbacks.dirpath=one"]
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
    assert flow[1]._state.resumed


def test_force_reaches_the_callbacks():
    for force in (True, False):
        cli = main(["fit", *QUICK, f"-c={METHODS[0]}", "--trainer.fast_dev_run=1", *(["--force"] if force else [])])
        found = [
            c.force for c in cli.trainer.callbacks if isinstance(c, fl.FlowWeightingCallback | LinearProbeCallback)
        ]
        assert found == [force, force]


@pytest.mark.parametrize(("command", "metric"), [("validate", "val/top1"), ("test", "test/top1")])
def test_validate_and_test_measure(command, metric):
    """Though the quickstart leaves validation out of its fits."""
    options = [option for option in QUICK if "limit_val" not in option]
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


@pytest.mark.parametrize("arguments", [[], ["fit"], ["score"], ["compare"]], ids=" ".join)
def test_help_reads(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for word in {"compare": ["--methods", "--seeds", "--output"], "": ["score", "compare"]}.get(
        "".join(arguments), ["--retention.images"]
    ):
        assert word in printed


def test_missing_data_says_where_it_looked():
    with pytest.raises(FileNotFoundError, match=r"flowers-102.*download"):
        main(["fit", f"-c={ROOT}/configs/vision/flowers102_resnet18.yaml", *TINY])
