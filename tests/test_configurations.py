"""Names of shipped configurations, from a checkout, from a wheel, and on a command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flow_lightning.__main__ import main
from flow_lightning.configurations import FOLDER, OptionError, find_configuration, find_part, shipped, with_files

ROOT = Path(__file__).parents[1]


def test_every_file_below_configs_has_a_name_and_is_found_by_it():
    files = set((ROOT / "configs").rglob("*.yaml"))
    assert len([file for file in files if file.parent.name == "vision"]) == 7 and set(shipped().values()) == files
    for name, file in shipped().items():
        assert find_configuration(name) == find_configuration(f"configs/{name}.yaml") == file
    for name in ("vision/cifar10", "quickstart", "language/lora", "methods/flow"):
        assert find_configuration(name.rpartition("/")[2]) == FOLDER / f"{name}.yaml"


def test_a_file_that_exists_comes_before_a_name():
    Path("cifar10").write_text("seed_everything: 3\n")
    Path("flow.yaml").write_text("method: mine\n")
    assert find_configuration("cifar10") == Path("cifar10")
    assert find_part("method", "flow.yaml") == Path("flow.yaml")
    assert find_part("method", "flow") == FOLDER / "methods" / "flow.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-c cifar1", "Did you mean cifar10?"),
        ("-c configs/vision/stanfordcars.yaml", "Did you mean vision/stanford_cars?"),
        ("-c my.yaml", "no file and no shipped name"),
        ("--method token_mask", "Did you mean token_masking?"),
        ("--method cifar10", "No method 'cifar10'"),
        ("-c", "-c/--config: expected one argument"),
        ("--method --trainer.max_epochs=1", "--method: expected one argument"),
        ("-c cifar10 --method standard --method flow", "two methods"),
    ],
)
def test_a_wrong_name_says_the_nearest_right_one(words, message):
    with pytest.raises(OptionError, match=message):
        with_files(["fit", *words.split()])


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ("fit -c cifar10 --method flow", "cifar10 flow"),
        ("fit --method=flow --config=cifar10 -c resumable", "cifar10 flow resumable"),
        ("fit --method flow -c cifar10 -c resumable", "cifar10 flow resumable"),
        ("fit -c=cifar10 -c resumable --method flow", "cifar10 resumable flow"),
        ("fit --method flow", "flow"),
    ],
)
def test_a_method_comes_where_it_stands_but_after_the_first_configuration(words, order):
    assert [Path(word).stem for word in with_files(words.split())[1:]] == order.split()


def test_other_words_come_after_the_configurations_and_stay_as_they_are():
    given = "--config={seed_everything: 3}"
    others = ["--trainer.max_epochs", "3", "-x", "--model.model=flow", "-1", "[1, 2]", "--help"]
    assert with_files(["fit", *others[:3], given, *others[3:]]) == ["fit", given, *others]


def test_a_wheel_carries_the_configurations_and_finds_them_by_name():
    """Built without network from a copy of the sources, and run from a folder that is no checkout."""
    built = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheel", "./source"]
    copied = ["flow_lightning", "configs", "pyproject.toml", "README.md", "LICENSE"]
    Path("source").mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), "source"], check=True)
    subprocess.run(built, check=True, capture_output=True)
    (wheel,) = Path("wheel").glob("flow_lightning-*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), "site"], check=True)
    for folder, pattern in (("flow_lightning", "*.py"), ("configs", "*.yaml")):
        inside = Path("site/flow_lightning" if folder == "flow_lightning" else "site/flow_lightning/configs")
        wanted = {file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob(pattern)}
        assert {file.relative_to(inside) for file in inside.rglob(pattern)} == wanted
    (scripts,) = Path("site").glob("*.dist-info/entry_points.txt")
    assert "flow-lightning = flow_lightning.__main__:script" in scripts.read_text()
    environment = {**os.environ, "PYTHONPATH": str(Path("site").absolute())}
    code = "from flow_lightning.configurations import find_configuration as f; print(f('cifar10'))"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path("site/flow_lightning/configs/vision/cifar10.yaml").absolute()


def test_the_data_of_a_budget_stay_the_name_of_a_file(capsys):
    Path("labels.csv").write_text("file,class_index\n")
    with pytest.raises(SystemExit):
        main(["fit", "-c", "digits", "-c", "budget", "--trainer.callbacks.data=labels.csv", "--print_config"])
    assert "data: labels.csv" in capsys.readouterr().out
