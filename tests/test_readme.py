"""The README and the texts beside it say what the code does."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import flow_lightning as fl
from flow_lightning.__main__ import COMMANDS
from flow_lightning.configurations import names_of, shipped, with_files
from flow_lightning.report.metrics import METRICS

ROOT = Path(__file__).parents[1]
TEXTS = ["README.md", "configs/README.md", "tests/benchmarks/README.md", ".github/CONTRIBUTING.md", "CHANGELOG.md"]
PLACEHOLDERS = {"CONFIG": "cifar10", "METHOD": "flow"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every command of the texts and of the comments in configurations, without the launcher before it."""
    blocks = [block for name in TEXTS for block in re.findall(r"```bash\n(.*?)```", text_of(name), re.DOTALL)]
    comments = ["\n".join(re.findall(r"^#   (.*)$", path.read_text(), re.MULTILINE)) for path in shipped().values()]
    lines = "\n".join([*blocks, *comments]).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:flow-lightning|main\.py) (.*)", line) for line in lines if not line.startswith("#")]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("command", commands())
def test_every_command_names_configurations_and_commands_that_exist(command):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    assert words[0] in {*COMMANDS, "--help"}
    assert all(Path(word.partition("=")[2]).is_file() for word in with_files(words) if word.startswith("--config="))
    methods = yaml.safe_load(words[words.index("--methods") + 1]) if "--methods" in words else []
    assert set(methods) <= {*names_of("methods"), "tests/benchmarks/mean_rate.yaml"}


def test_the_readme_is_one_page_and_every_link_leads_to_a_file():
    assert len(text_of("README.md").splitlines()) <= 120 and len(commands()) > 15
    for name in TEXTS:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(name)):
            assert (ROOT / name).parent.joinpath(link).exists(), (name, link)


def test_the_tables_list_every_metric_configuration_and_method():
    text = text_of("configs/README.md")
    meanings = [(m, m.name.replace("|", "\\|")) for m in METRICS]
    rows = [f"| `{m.key}` | {meaning} | {m.unit} | {m.better} |" for m, meaning in meanings]
    assert "\n".join(["| key | meaning | unit | better |", "|---|---|---|---|", *rows]) in text, rows
    listed = set(re.findall(r"`([\w/]+)`", "\n".join(re.findall(r"^\| `.*?\|", text, re.MULTILINE))))
    assert all(name in listed or name.rpartition("/")[2] in listed for name in shipped())


def test_the_test_command_runs_the_linters_and_ci_runs_the_test_command():
    command = text_of("README.md").split("<!-- test command -->")[1].split("```bash\n")[1].split("\n```")[0]
    assert all(part in command for part in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest"))
    assert "<!-- test command -->" in text_of(".ci/run")


@pytest.mark.parametrize("sign", ["+", "-"])
def test_the_diff_of_a_project_runs_before_and_after(sign):
    diff = text_of("README.md").split("```diff\n")[1].split("```")[0]
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (" ", sign)]
    example = text_of("README.md").split("<!-- example -->\n```python\n")[1].split("```")[0]
    names = {}
    exec(example.split("flow = ")[0], names)
    names |= {"module": names["Classifier"](), "loader": names["DataLoader"](names["samples"], batch_size=8)}
    exec("\n".join(lines), names)
    assert names["trainer"].global_step == 16
    assert any(isinstance(c, fl.FlowWeightingCallback) for c in names["trainer"].callbacks) == (sign == "+")


def test_the_whole_program_of_the_readme_prints_what_it_says(capsys):
    example = text_of("README.md").split("<!-- example -->\n```python\n")[1].split("```")[0]
    exec(example, {})
    assert "flow/temperature" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "tests/benchmarks").glob("[!_]*.py")))
def test_each_benchmark_says_how_to_start_it_from_the_top_of_the_repository(script):
    text = (ROOT / f"tests/benchmarks/{script}.py").read_text()
    commands = re.findall(r"python (.*tests.benchmarks\S*)", text)
    assert set(commands) <= {f"-m tests.benchmarks.{script}"}
    assert bool(commands) == ("__main__" in text)
