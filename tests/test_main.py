"""`flow-lightning --help`, as a new user types it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flow_lightning.__main__ import help_text, main
from flow_lightning.cli import FlowCLI, FlowParser
from flow_lightning.cli import main as run
from flow_lightning.configurations import shipped

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [[], ["--help"], ["fit", "-h"], ["compare", "-c", "quickstart", "--help"]])
def test_help_answers_at_once_with_commands_configurations_and_methods(words):
    for command in ([sys.executable, "-m", "flow_lightning"], [sys.executable, str(ROOT / "main.py")]):
        started = time.perf_counter()
        printed = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert time.perf_counter() - started < 3 and printed == help_text()
    assert all(name.removeprefix("methods/") in printed for name in shipped())
    assert all(f"\n  {name} " in printed for name in (*FlowCLI.subcommands(), "compare"))


def test_every_option_of_the_help_exists(capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--help-all"])
    every = capsys.readouterr().out
    for option in set(re.findall(r"--([a-z_.]+)", help_text())) - {"methods", "seeds", "output", "help-all", "help"}:
        assert option in FlowParser.keys or f"--{option}" in every or option in ("method", "model.help"), option


def test_a_wrong_name_is_told_at_once():
    command = [sys.executable, "-m", "flow_lightning", "fit", "-c", "cifar"]
    started = time.perf_counter()
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert time.perf_counter() - started < 3
    assert end.returncode == 2 and "Did you mean cifar10?" in end.stderr and len(end.stderr.splitlines()) == 1


def test_other_words_reach_the_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "cifar10", "--max_epochs=3"])
    assert end.value.code == 2 and "Did you mean trainer.max_epochs?" in capsys.readouterr().err
