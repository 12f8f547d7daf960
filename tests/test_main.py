"""`flow-lightning`, as a new user types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from flow_lightning.__main__ import COMMANDS, help_text, main
from flow_lightning.cli import _PARSER_NAMES, FlowParser
from flow_lightning.compare import board_parser
from flow_lightning.configurations import shipped
from tests.test_cli import error_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "words", ["-m flow_lightning", "main.py --help", "main.py fit -h", "-m flow_lightning compare -c x --help"]
)
def test_help_names_commands_configurations_and_methods(words):
    command = [sys.executable, *words.split()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == help_text()
    assert all(name.removeprefix("methods/").removeprefix("optimizers/") in printed for name in shipped())
    assert all(f"\n  {name} " in printed for name in COMMANDS) and set(COMMANDS) == {
        *LightningCLI.subcommands(),
        "score",
        "compare",
        "report",
    }


def test_every_option_of_the_help_exists(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help-all"])
    assert end.value.code == 0
    every = capsys.readouterr().out
    of_boards = {action.dest for action in board_parser()._actions}
    for option in set(re.findall(r"--([a-z_.-]+)", help_text())) - of_boards - {"help-all", "help"}:
        name = _PARSER_NAMES.get(f"--{option}", f"--{option}").removeprefix("--")
        assert name in FlowParser.keys or f"--{name}" in every or name in ("method", "model.help"), option


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fti -c cifar10", "Did you mean fit?"),
        ("-c cifar10", "first word must be a command"),
        ("fit", "fit needs a configuration"),
        ("fit -c cifar", "Did you mean cifar10?"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_imported(words, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_lightning.cli", None)
    assert message in error_of(capsys, *words.split())
