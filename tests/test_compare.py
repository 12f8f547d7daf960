"""`compare` through the real command line: several methods and seeds of one configuration, side by side."""

import json
from pathlib import Path

import pytest

from flow_lightning.__main__ import main
from tests.data.fake_datasets import make_folder
from tests.test_cli import QUICK, error_of


@pytest.fixture(autouse=True)
def images():
    make_folder(Path("data"))


def compare(*options) -> dict:
    main(["compare", *QUICK, *options, "--output=runs/x"])
    return json.loads(Path("runs/x/comparison.json").read_text())


def test_compare_puts_methods_and_seeds_side_by_side(capsys, rendered):
    runs = compare("--methods=[flow, standard]", "--seeds=[1,2]")
    assert {name: len(column) for name, column in runs.items()} == {"flow": 2, "standard": 2}
    assert Path("runs/x/comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in runs:
        for run, seed in zip(runs[name], (1, 2)):
            assert run == json.loads(next(Path(f"runs/x/{name}/seed-{seed}").rglob("metrics.json")).read_text())
            assert ("flow/temperature" in run) == (name == "flow")
    table = capsys.readouterr().out
    assert "flow" in table and "standard" in table and "±" in table


def test_compare_goes_on_after_a_run_that_diverged_and_fails_at_the_end(capsys):
    with pytest.raises(FloatingPointError, match=r"leaves out(.|\n)*standard/seed-1: The training loss is NaN"):
        compare("--trainer.limit_train_batches=3", "--learning_rate={standard: 1e36, flow: 0.001}", "--seeds=[1]")
    runs = json.loads(Path("runs/x/comparison.json").read_text())
    assert runs["standard"] == [{}] and runs["flow"][0]["target/top1"] > 0
    assert "target accuracy" in capsys.readouterr().out


def test_without_seeds_each_method_runs_once_at_the_seed_of_the_configuration():
    Path("mine.yaml").write_text("method: mine\nlearning_rate: 0.125\n")
    assert list(compare("--methods=mine.yaml")) == ["mine"]
    (config,) = Path("runs/x/mine/default").rglob("config.yaml")
    assert "seed_everything: 1\n" in config.read_text() and "learning_rate: 0.125\n" in config.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods=[standard, flo]"], "No method 'flo'. Did you mean flow?"),
        (["--method=flow"], "compare takes its methods from --methods"),
        (["--seeds=[one]"], "seed_everything: 'one' is no valid value"),
        (["--outptu=x"], "There is no option 'outptu'"),
    ],
)
def test_a_wrong_option_is_named_before_any_run(options, message, capsys):
    assert message in error_of(capsys, "compare", *QUICK, *options)
    assert not Path("runs").exists()
