"""Every shipped method for one tiny step through the real command line, so that a board can run all."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning import Callback
from yaml import safe_load

from flow_lightning.__main__ import main
from flow_lightning.configurations import callbacks_of, find_part, names_of
from flow_lightning.report.metrics import read_metrics
from tests.data.fake_datasets import make_folder
from tests.examples import slow
from tests.language import TOKENIZER, instructions, tiny_model, write_jsonl
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


def test_a_companion_joins_flow_and_its_own_probe_replaces_that_of_the_configuration():
    make_folder(Path("data"))
    cli = main(["fit", *QUICK, "--method=flow_out_of_fold", "-c=gce", *STEP])
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"FlowWeightingCallback", "OnlineWeightsCallback"} <= set(names) and names.count("LinearProbeCallback") == 1
    (probe,) = (each for each in cli.trainer.callbacks if type(each).__name__ == "LinearProbeCallback")
    assert probe.folds == 5
