"""`compare` through the real command line: several methods and seeds of one configuration, side by side."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flow_lightning.__main__ import main
from flow_lightning.report.metrics import write_metrics
from tests.data.fake_datasets import make_folder
from tests.test_cli import QUICK, error_of


@pytest.fixture(autouse=True)
def images():
    make_folder(Path("data"))


def compare(*options) -> dict:
    main(["compare", *QUICK, *options, "--output=runs/x"])
    return json.loads(Path("runs/x/comparison.json").read_text())


def test_compare_puts_methods_and_seeds_side_by_side(capsys, caplog):
    with caplog.at_level("INFO"):
        runs = compare("--methods=[flow, standard]", "--seeds=[1,2]", "--data.decoded=pixels.npy")
    assert caplog.text.count("Decoding 36 images into pixels.npy") == 1, "the fits share them"
    assert {name: len(column) for name, column in runs.items()} == {"flow": 2, "standard": 2}
    assert "4 runs of 2 methods: flow, standard" in Path("runs/x/report.html").read_text()
    for name in runs:
        for run, seed in zip(runs[name], (1, 2)):
            assert run == json.loads(next(Path(f"runs/x/{name}/seed-{seed}").rglob("metrics.json")).read_text())
            assert ("flow/temperature" in run) == (name == "flow")
    table = capsys.readouterr().out
    assert "flow" in table and "standard" in table and "±" in table
    assert sorted(path.stem for path in Path("runs/x/frozen").iterdir()) == ["target", "training"]


def test_compare_goes_on_after_a_run_that_diverged_and_fails_at_the_end(capsys):
    with pytest.raises(FloatingPointError, match=r"leaves out(.|\n)*standard/seed-1: The training loss is NaN"):
        compare("--trainer.limit_train_batches=3", "--learning_rate={standard: 1e36, flow: 0.001}", "--seeds=[1]")
    runs = json.loads(Path("runs/x/comparison.json").read_text())
    assert runs["standard"] == [{}] and runs["flow"][0]["target/top1"] > 0
    assert "target accuracy" in capsys.readouterr().out


def test_what_a_board_varies_reaches_the_fit_and_without_seeds_that_of_the_configuration_holds():
    Path("mine.yaml").write_text("method: mine\nlearning_rate: 0.125\n")
    Path("own.yaml").write_text("board: {noise: [0.5], methods: mine.yaml, optimizers: adamw}\n")
    assert list(compare("-c=own.yaml", "--trainer.max_steps=1")) == ["mine adamw noise 0.5"]
    (config,) = Path("runs/x/mine-adamw-noise-0.5/default").rglob("config.yaml")
    text = config.read_text()
    assert "seed_everything: 1\n" in text and "learning_rate: 0.125\n" in text and "torch.optim.AdamW" in text
    assert "rate: 0.5\n" in text.partition("label_noise:")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods=[standard, flo]"], "No method 'flo'. Did you mean flow?"),
        (["--method=flow"], "compare takes its methods from --methods"),
        (["--seeds=[one]"], "seed_everything: 'one' is no valid value"),
        (["--outptu=x"], "There is no option 'outptu'"),
        (["--noise=[0, 30]"], "--noise has 30; expected shares of wrong labels from 0 to below 1"),
        (["--rates=[1e-4, lots]"], "--rates has 'lots'; expected learning rates above 0"),
        (["--rates=[0.1, 0]"], "--rates has 0; expected learning rates above 0"),
        (["--rates=[true, 0.5]"], "--rates has True; expected learning rates above 0"),
        (["--rates=[0.1, 0.10000001]"], "and rates that differ in their first six digits"),
        (["--methods=[flow, mine/flow.yaml]"], "Two fits would write to runs/compare/flow/default. Give"),
        (["--part=1"], "--part is '1'; expected 0/4"),
        (["--jobs=two"], "argument --jobs: invalid int value: 'two'"),
    ],
)
def test_a_wrong_option_is_named_before_any_run(options, message, capsys):
    Path("mine").mkdir()
    Path("mine/flow.yaml").write_text("method: flow\n")
    assert message in error_of(capsys, "compare", *QUICK, *options)
    assert not Path("runs").exists()


class Made(list):
    """Fits that take no time: their commands, in the order in which they were made; killed before `killed_at`."""

    killed_at = None

    def run(self, words):
        if len(self) == self.killed_at:
            raise KeyboardInterrupt
        self.append(words)
        options = dict(word.split("=", 1) for word in words[1:])
        folder, rate = Path(options["--trainer.default_root_dir"]), float(options.get("--learning_rate", 0.1))
        write_metrics(folder / "metrics.json", {"target/top1": rate, "retention/after/top1": 0.5})
        return SimpleNamespace(trainer=folder)


@pytest.fixture
def made(monkeypatch):
    made = Made()
    monkeypatch.setattr("flow_lightning.compare.run", made.run)
    monkeypatch.setattr("flow_lightning.compare.run_directory", lambda folder: folder)
    return made


BOARD = ["--methods=[flow, standard]", "--rates=[0.001, 0.004]", "--optimizers=[sgd, adamw]", "--seeds=[1, 2]"]


def test_a_board_that_was_killed_makes_what_is_missing_and_what_changed(made):
    made.killed_at = 5
    with pytest.raises(KeyboardInterrupt):
        compare(*BOARD)
    made.killed_at = None
    runs = compare(*BOARD)
    assert len(made) == 2 * 2 * 2 * 2 and len({tuple(words) for words in made}) == 16
    assert sorted(runs) == sorted(
        f"{m} {o} {r}" for m in ("flow", "standard") for o in ("sgd", "adamw") for r in (0.001, 0.004)
    )
    assert [run["target/top1"] for run in runs["flow adamw 0.004"]] == [0.004, 0.004]
    compare(*BOARD)
    assert len(made) == 16, "all is finished"
    compare(*BOARD, "--trainer.max_epochs=1")
    assert len(made) == 32, "another command is another fit"


def test_a_fit_is_made_again_when_a_file_of_it_says_something_else(made):
    file = Path("mine.yaml")
    file.write_text("method: mine\nlearning_rate: 0.5\ntrainer: {gradient_clip_val: .inf}\n")
    for text, fits in ((None, 1), ("# A comment.\n" + file.read_text(), 1), ("method: mine\nlearning_rate: 0.25\n", 2)):
        if text is not None:
            file.write_text(text)
        compare("--methods=mine.yaml")
        assert len(made) == fits


def test_a_board_in_a_configuration_may_grow_and_a_file_that_changes_during_a_fit_is_seen(made, monkeypatch):
    file = Path("mine.yaml")
    file.write_text("learning_rate: 0.5\nboard: {seeds: [1]}\n")
    compare("-c=mine.yaml", "--methods=flow")
    file.write_text("learning_rate: 0.5\nboard: {seeds: [1, 2]}\n")
    compare("-c=mine.yaml", "--methods=flow")
    assert len(made) == 2, "seed 1 is finished"

    def edited(words, run=made.run):
        file.write_text("learning_rate: 0.1\nboard: {seeds: [3]}\n")
        return run(words)

    file.write_text("learning_rate: 0.5\nboard: {seeds: [3]}\n")
    monkeypatch.setattr("flow_lightning.compare.run", edited)
    main(["compare", *QUICK, "-c=mine.yaml", "--methods=flow", "--output=runs/x"])
    assert len(made) == 3
    compare("-c=mine.yaml", "--methods=flow")
    assert len(made) == 4, "the fit was of what the file said before"


def test_rates_may_be_written_with_an_exponent_alone(made):
    """YAML reads 1e-4 as a text, as it has no dot."""
    assert list(compare("--methods=flow", "--rates=[1e-4, 2.0e-4]")) == ["flow 0.0001", "flow 0.0002"]
    assert [word for words in made for word in words if "learning_rate" in word] == [
        "--learning_rate=0.0001",
        "--learning_rate=0.0002",
    ]


def test_parts_of_a_board_add_up_and_the_last_one_reports(made, caplog):
    main(["compare", *QUICK, *BOARD, "--output=runs/x", "--part=0/2"])
    assert len(made) == 8 and not Path("runs/x/comparison.json").exists()
    runs = compare(*BOARD, "--part=1/2")
    assert len(made) == 16 and len(runs) == 8


def test_a_board_can_come_from_a_file(made):
    Path("board.yaml").write_text("methods: [flow]\nrates: [0.5, 0.25]\nseeds: 3\n")
    assert set(compare("--board=board.yaml")) == {"flow 0.5", "flow 0.25"}
    assert set(compare("--board=board.yaml", "--methods=standard")) == {"standard 0.5", "standard 0.25"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rates: [0.5]\n", "--rates is [0.5]: a board needs at least two"),
        ("rates: [\n", "board.yaml cannot be read: while parsing"),
        ("- 1\n", "board.yaml holds a list; expected options"),
        ("seed: 3\n", "has ['seed'], but a board has jobs, methods, noise, optimizers"),
        ("optimizers: [adam]\n", "No optimizer 'adam'. Did you mean adamw?"),
    ],
)
def test_a_wrong_board_is_an_error_before_any_fit(content, message, capsys):
    Path("board.yaml").write_text(content)
    assert message in error_of(capsys, "compare", *QUICK, "--board=board.yaml")
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", ["--methods={}", "-c={}"])
@pytest.mark.parametrize(("content", "message"), [("a: [\n", "cannot be read: while"), ("- 1\n", "holds a list")])
def test_a_file_that_holds_no_options_is_an_error_before_any_fit(option, content, message, capsys):
    Path("mine.yaml").write_text(content)
    assert f"mine.yaml {message}" in error_of(capsys, "compare", *QUICK, option.format("mine.yaml"))
    assert not Path("runs").exists()


def test_shares_of_wrong_labels_come_from_a_configuration_and_the_command_line_wins(made):
    Path("mine.yaml").write_text("board: {noise: [0, 0.3], methods: flow}\n")
    assert set(compare("-c=mine.yaml")) == {"flow noise 0", "flow noise 0.3"}
    assert [word for words in made for word in words if "noise.rate" in word] == [
        "--data.label_noise.rate=0",
        "--data.label_noise.rate=0.3",
    ]
    assert set(compare("-c=mine.yaml", "--noise=0.2")) == {"flow noise 0.2"}
    Path("board.yaml").write_text("noise: [0.1]\n")
    assert set(compare("-c=mine.yaml", "--board=board.yaml")) == {"flow noise 0.1"}


def test_jobs_share_a_board_and_its_devices(made, monkeypatch):
    devices = []

    class Process:
        """Runs the command of a process here."""

        def __init__(self, command, env):
            devices.append(env.get("CUDA_VISIBLE_DEVICES"))
            assert command[1:3] == ["-m", "flow_lightning"]
            main(command[3:])

        def wait(self):
            return 0

    monkeypatch.setattr("flow_lightning.compare.subprocess.Popen", Process)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    runs = compare(*BOARD, "--jobs=3")
    assert devices == ["0", "1", "0"] and len(made) == 16 and len({tuple(words) for words in made}) == 16
    assert sum(map(len, runs.values())) == 16


def test_a_process_of_a_board_that_failed_is_told(made, monkeypatch, capsys):
    monkeypatch.setattr("flow_lightning.compare.subprocess.Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 1))
    assert "The same command goes on from there" in error_of(capsys, "compare", *QUICK, *BOARD, "--jobs=2")


@pytest.mark.parametrize(
    ("rates", "seeds", "numbers"),
    [
        ("[1, 2, 3, 4]", "[1, 2, 3]", ["4 rates and 3 seeds"]),
        ("[1, 2, 3, 4, 5]", "[1, 2]", ["5 rates and 2 seeds"]),
        ("[1, 2, 3, 4, 4]", "[1, 2, 3]", ["4 rates and 3 seeds"]),
        ("[1, 2, 3, 4, 5]", "[1, 2, 3]", []),
        ("null", "null", []),  # methods side by side at one rate are no board of rates
    ],
)
def test_a_board_with_few_rates_or_seeds_says_what_a_fair_one_needs(made, recwarn, rates, seeds, numbers):
    compare("--methods=[flow]", f"--rates={rates}", f"--seeds={seeds}")
    said = [str(w.message) for w in recwarn if "at least 5 rates" in str(w.message)]
    assert [message.partition("has ")[2].partition(". ")[0] for message in said] == numbers
