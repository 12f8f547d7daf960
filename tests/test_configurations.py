"""Names of shipped configurations, from a checkout, from a wheel, and on a command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flow_lightning
from flow_lightning.configurations import FOLDER, OptionError, find_configuration, find_method, shipped, with_files

ROOT = Path(__file__).parents[1]


def test_every_file_below_configs_has_a_name_and_is_found_by_it():
    files = set((ROOT / "configs").rglob("*.yaml"))
    assert len([file for file in files if file.parent.name == "vision"]) == 7 and set(shipped().values()) == files
    for name, file in shipped().items():
        assert find_configuration(name) == find_configuration(f"configs/{name}.yaml") == file


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "vision/cifar10"), ("quickstart", "quickstart"), ("lora", "language/lora"), ("flow", "methods/flow")],
)
def test_the_folder_of_a_name_may_be_left_out(name, file):
    assert find_configuration(name) == FOLDER / f"{file}.yaml"


def test_a_file_that_exists_comes_before_a_name():
    Path("cifar10").write_text("seed_everything: 3\n")
    Path("flow.yaml").write_text("method: mine\n")
    assert find_configuration("cifar10") == Path("cifar10")
    assert find_method("flow.yaml") == Path("flow.yaml") and find_method("flow") == FOLDER / "methods" / "flow.yaml"


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (find_configuration, "cifar1", "Did you mean cifar10?"),
        (find_configuration, "configs/vision/stanfordcars.yaml", "Did you mean vision/stanford_cars?"),
        (find_configuration, "my.yaml", "no file and no shipped name"),
        (find_method, "token_mask", "Did you mean token_masking?"),
        (find_method, "cifar10", "No method 'cifar10'"),
    ],
)
def test_a_wrong_name_says_the_nearest_right_one(find, name, message):
    with pytest.raises(OptionError, match=message):
        find(name)


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ("fit -c cifar10 --method flow", "cifar10 flow"),
        ("fit --method=flow --config=cifar10", "cifar10 flow"),
        ("fit --method flow -c cifar10 -c resumable", "cifar10 flow resumable"),
        ("fit -c=cifar10 -c resumable --method flow", "cifar10 resumable flow"),
        ("fit --method flow", "flow"),
    ],
)
def test_a_method_comes_where_it_stands_but_after_the_first_configuration(words, order):
    assert [Path(word).stem for word in with_files(words.split())[1:]] == order.split()


def test_other_words_and_a_configuration_in_place_stay_as_they_are():
    words = ["fit", "--trainer.max_epochs", "3", "--config={seed_everything: 3}", "-x", "--model.model=flow"]
    assert with_files(words) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit -c", "-c needs a value"),
        ("fit --method --trainer.max_epochs=1", "--method needs a value"),
        ("fit -c cifar10 -c configs/methods/flow.yaml --method flow", "2 methods, flow and flow"),
    ],
)
def test_an_option_without_value_and_a_second_method_are_errors(words, message):
    with pytest.raises(OptionError, match=message):
        with_files(words.split())


def test_a_wheel_carries_the_configurations_and_finds_them_by_name(tmp_path):
    """Built without network from a copy of the sources, and run from a folder that is no checkout."""
    built = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheel", "./source"]
    copied = ["flow_lightning", "configs", "pyproject.toml", "README.md", "LICENSE"]
    Path("source").mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), "source"], check=True)
    subprocess.run(built, check=True, capture_output=True)
    (wheel,) = Path("wheel").glob("flow_lightning-*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), "site"], check=True)
    inside = {file.relative_to("site/flow_lightning/configs") for file in Path("site").rglob("*.yaml")}
    assert inside == {file.relative_to(ROOT / "configs") for file in (ROOT / "configs").rglob("*.yaml")}
    (scripts,) = Path("site").glob("*.dist-info/entry_points.txt")
    assert "flow-lightning = flow_lightning.__main__:main" in scripts.read_text()
    packages = {file.parent for file in (ROOT / "flow_lightning").rglob("*.py")}
    assert {ROOT / file.relative_to("site").parent for file in Path("site/flow_lightning").rglob("*.py")} == packages
    environment = {**os.environ, "PYTHONPATH": str(Path("site").absolute())}
    code = "from flow_lightning.configurations import find_configuration as f; print(f('cifar10'))"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path("site/flow_lightning/configs/vision/cifar10.yaml").absolute()
    assert Path(flow_lightning.__file__).parents[1] == ROOT
