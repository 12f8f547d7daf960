"""Every shipped method for one tiny step through the real command line, so that a board can run all."""

import csv
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Callback
from yaml import safe_load

from flow_lightning.__main__ import main
from flow_lightning.configurations import callbacks_of, find_part, names_of
from flow_lightning.report.metrics import read_metrics
from tests.data.fake_datasets import make_folder
from tests.examples import slow
from tests.language import TOKENIZER, instructions, tiny_model, write_jsonl
from tests.retention import unlabelled_images
from tests.test_cli import QUICK
from tests.test_cli_language import TINY

#: Methods for language models alone, and methods for images alone: those that need a head to probe or solve.
TOKENS = {"flow_sequence", "flow_token", "matched", "token_masking", "text_anchor"}
IMAGES = {"weighted_probe", "plain_weighted_head", "flow_out_of_fold", "flow_mixture", "excess", "drop", "posterior"}
IMAGES |= {"recommended", "lwf", "ldifs", "label_smoothing", "elr"}
#: The others run on both; each makes its step on one of them, by turns.
EITHER = sorted({*names_of("methods")} - TOKENS - IMAGES)
#: These make a step in every run of the tests, the others with `pytest -m slow`.
QUICKLY = {"recommended", "label_smoothing", "layer_decay", "token_masking"}
STEP = ["--learning_rate=0.001", "--trainer.max_epochs=1", "--trainer.max_steps=1"]


def steps_of(methods):
    """Return the methods as parameters, slow but for those of `QUICKLY`."""
    return [method if method in QUICKLY else slow(method) for method in sorted(methods)]


@pytest.mark.parametrize("method", names_of("methods"))
def test_the_callbacks_of_every_method_can_be_made(method):
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    trainer = safe_load(find_part("method", method).read_text()).get("trainer", {})
    made = parser.instantiate(parser.parse_object({"callbacks": trainer.get("callbacks+", [])}))
    assert {type(callback).__name__ for callback in made.callbacks} == callbacks_of(method)


@pytest.mark.parametrize("method", steps_of({*IMAGES, *EITHER[::2]}))
def test_every_method_for_images_makes_a_step(method):
    make_folder(Path("data"))
    cli = main(["fit", *QUICK, f"--method={method}", *STEP])
    assert callbacks_of(method) <= {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert cli.trainer.global_step == (method != "weighted_probe")
    assert 0 <= read_metrics(Path(cli.trainer.log_dir) / "metrics.json")["target/top1"] <= 1


@pytest.mark.parametrize("method", steps_of({*TOKENS, *EITHER[1::2]}))
def test_every_method_for_text_makes_a_step(method):
    TOKENIZER.save_pretrained("tiny")
    tiny_model(len(TOKENIZER)).save_pretrained("tiny")
    write_jsonl(Path("train.jsonl"), instructions(9))
    options = ["--data.train=train.jsonl", "--data.batch_size=4"]
    cli = main(["fit", "-c=gemma2_2b_metamathqa", f"--method={method}", *TINY, *options, *STEP])
    assert cli.trainer.global_step == 1
    assert callbacks_of(method) <= {type(callback).__name__ for callback in cli.trainer.callbacks}


def test_the_recommended_method_has_a_rate_for_adamw_of_its_own():
    make_folder(Path("data"))
    cli = main(["fit", *QUICK, "--method=recommended", "--learning_rate=null", "--trainer.fast_dev_run=1"])
    assert isinstance(cli.trainer.optimizers[0], torch.optim.AdamW) and cli.model.learning_rate == 3e-4
    cli = main(["fit", *QUICK, "--method=recommended", "--learning_rate=0.002", "--trainer.fast_dev_run=1"])
    assert cli.model.learning_rate == 0.002


def test_a_companion_joins_flow_and_its_own_probe_replaces_that_of_the_configuration():
    make_folder(Path("data"))
    cli = main(["fit", *QUICK, "--method=flow_out_of_fold", "-c=gce", *STEP])
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"FlowWeightingCallback", "OnlineWeightsCallback"} <= set(names) and names.count("LinearProbeCallback") == 1
    (probe,) = (each for each in cli.trainer.callbacks if type(each).__name__ == "LinearProbeCallback")
    assert probe.folds == 5


#: Companions that join the weights of FLOW, with the options of theirs that the tiny fit needs.
JOINED = [
    "l2_sp",
    "finch",
    "layer_decay",
    "label_smoothing",
    "early_stopping",
    "sfa",
    "lwf",
    "ldifs",
    "elr",
    "gce",
    "dft",
]


@pytest.mark.parametrize("companion", [name if name == "l2_sp" else slow(name) for name in JOINED])
def test_a_companion_works_together_with_the_weights_of_flow(companion):
    make_folder(Path("data"))
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--learning_rate=0.001"]
    cli = main(["fit", *QUICK, "--method=flow", f"-c={companion}", *options])
    assert callbacks_of("flow") | callbacks_of(companion) <= {type(each).__name__ for each in cli.trainer.callbacks}
    metrics = read_metrics(Path(cli.trainer.log_dir) / "metrics.json")
    assert cli.trainer.global_step == 2 and metrics["flow/temperature"] > 0 and 0 <= metrics["target/top1"] <= 1
    (flow,) = (each for each in cli.trainer.callbacks if type(each).__name__ == "FlowWeightingCallback")
    weights = flow.weights.weights
    assert weights.min() < weights.max() <= 1, "a companion put other weights in place of FLOW's"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_board_runs_all_methods_for_images_as_curves(tmp_path, rendered):
    make_folder(Path("data"))
    methods = sorted({*IMAGES, *EITHER} - {"weighted_probe"})  # without a training, it has no path
    budget = [f"--trainer.callbacks.data={unlabelled_images(tmp_path)}", "--trainer.callbacks.alphas=[0,1]"]
    budget += ["--trainer.callbacks.keep=0.1", "--trainer.callbacks.confidence=0.5"]
    board = [f"--methods=[{', '.join(methods)}]", "--noise=[0.3]", "--optimizers=adamw", "--learning_rate=0.001"]
    options = ["--data.validation_fraction=0.25", "--trainer.max_epochs=1", "--output=runs/all"]
    main(["compare", *QUICK, "-c=curve", *budget, *board, *options])
    with Path("runs/all/board.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["alpha"]) for row in rows] == [(name, a) for name in methods for a in ("0.0", "1.0")]
    for row in rows:
        assert 0 <= float(row["target"]) <= 1 and 0 <= float(row["target_hard"]) <= 1
    text = Path("runs/all/board.md").read_text()
    assert all(f"\n| {name} adamw |" in text for name in methods)
