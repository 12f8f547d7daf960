"""The package itself: its public names, and what importing it loads."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import flow_lightning as fl

ROOT = Path(__file__).parents[1]
HEAVY = ("timm", "torchvision", "matplotlib", "transformers", "lightning", "torch", "jsonargparse")
LANGUAGE = ("transformers", "peft", "datasets", "lm_eval", "gguf")


def printed(code: str) -> str:
    """Run code in a process of its own, on this checkout, and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_importing_the_package_and_its_command_loads_nothing_heavy():
    code = f"import sys, flow_lightning.__main__; print([name for name in {HEAVY} if name in sys.modules])"
    assert printed(code) == "[]\n"


def imported_by(path: Path) -> set[str]:
    """Return the modules that a file imports as it is imported itself."""
    found: set[str] = set()
    for line in ast.parse(path.read_text()).body:
        if isinstance(line, ast.Import):
            found |= {name.name for name in line.names}
        elif isinstance(line, ast.ImportFrom):
            found |= {line.module, *(f"{line.module}.{name.name}" for name in line.names)}
    return found


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_no_file_imports_a_language_package_at_its_top():
    for path in (ROOT / "flow_lightning").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported_by(path)} & {*LANGUAGE}, path


def test_files_behind_the_weights_import_little_beside_torch():
    names = "FlowWeightingCallback", "LinearProbeCallback", "WeightedLossModule", "IndexedDataset", "TokenWeights"
    todo, seen = {fl._HOME[name] for name in names}, set()
    while todo := {name for name in todo - seen if name.startswith("flow_lightning") and file_of(name).is_file()}:
        seen |= todo
        todo = set().union(*(imported_by(file_of(name)) for name in todo))
    packages = {name.partition(".")[0] for module in seen for name in imported_by(file_of(module))}
    assert packages & {*HEAVY, *LANGUAGE} == {"torch", "lightning"} and "safetensors" in packages


@pytest.mark.slow
def test_weights_for_a_module_of_ones_own_need_little_beside_torch_and_the_command_no_language_package():
    code = f"""
import sys, torch, lightning
before = set(sys.modules)
import flow_lightning as fl
fl.FlowWeightingCallback, fl.LinearProbeCallback, fl.WeightedLossModule, fl.IndexedDataset, fl.TokenWeights
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
sys.modules.update(dict.fromkeys({LANGUAGE}))  # an import of one of them fails now
import flow_lightning.cli, flow_lightning.modules.causal_language
"""
    assert printed(code) == "['flow_lightning', 'safetensors']\n"


def test_every_public_name_is_that_of_its_module():
    assert len(fl.__all__) == 34 and set(fl.__all__) <= set(dir(fl))
    for name in fl.__all__:
        assert getattr(fl, name) is getattr(import_module(fl._HOME[name]), name)
    with pytest.raises(AttributeError, match="no attribute 'FlowWeighting'"):
        fl.FlowWeighting  # noqa: B018
