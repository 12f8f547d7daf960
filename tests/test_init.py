"""The package itself: its public names, and what importing it loads."""

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
