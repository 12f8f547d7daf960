"""The package itself: its public names, and what importing it loads."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import flow_lightning as fl

ROOT = Path(__file__).parents[1]
HEAVY = ("timm", "torchvision", "matplotlib", "transformers", "lightning", "torch", "jsonargparse")


def printed(code: str) -> str:
    """Run code in a process of its own, on this checkout, and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_importing_the_package_and_its_command_loads_nothing_heavy():
    code = f"import sys, flow_lightning.__main__; print([name for name in {HEAVY} if name in sys.modules])"
    assert printed(code) == "[]\n"


def test_weights_for_a_module_of_ones_own_need_little_beside_torch_and_lightning():
    code = """
import sys, torch, lightning
before = set(sys.modules)
import flow_lightning as fl
fl.FlowWeightingCallback, fl.LinearProbeCallback, fl.WeightedLossModule, fl.IndexedDataset, fl.TokenWeights
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    assert printed(code) == "['flow_lightning', 'safetensors']\n"


def test_every_public_name_is_there_and_known_to_editors():
    for module, names in fl._PUBLIC.items():
        for name in names:
            assert getattr(fl, name) is getattr(import_module(f"flow_lightning.{module}"), name)
    assert set(fl.__all__) <= set(dir(fl))
    source = Path(fl.__file__).read_text()
    typed = {f"from flow_lightning.{m} import {n} as {n}" for m, names in fl._PUBLIC.items() for n in names}
    assert {line.strip() for line in source.splitlines() if line.startswith("    from ")} == typed


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'FlowWeighting'"):
        fl.FlowWeighting  # noqa: B018
