"""The folder of the fine-tuned model: transformers reads from it what was trained."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

import flow_lightning as fl
from tests.examples import RegressionData, fit
from tests.language import language_module
from tests.retention import language_fit


def assert_same(folder, model):
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("root", "folder"), [("run", "run/model"), (None, "model")])
def test_transformers_loads_the_fine_tuned_model(root, folder):
    module, _ = language_fit(fl.SavePretrainedCallback(), default_root_dir=root)
    assert_same(folder, module.causal_lm)


def test_a_folder_of_an_earlier_run_is_replaced_when_the_new_one_is_whole(monkeypatch):
    module, _ = language_fit(fl.SavePretrainedCallback(folder="saved"))
    before = sorted(os.listdir("saved"))

    def fail(*args, **kwargs):
        raise OSError("no space left")

    broken = language_module()
    monkeypatch.setattr(broken.model, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        language_fit(fl.SavePretrainedCallback(folder="saved"), module=broken)
    assert sorted(os.listdir("saved")) == before
    assert_same("saved", module.causal_lm)
    again, _ = language_fit(fl.SavePretrainedCallback(folder="saved"), max_epochs=1)
    assert_same("saved", again.causal_lm)
    assert not [name for name in os.listdir() if "unfinished" in name]


def test_another_module_is_refused():
    with pytest.raises(TypeError, match=r"LinearRegression has no save_pretrained\(folder\)"):
        fit(fl.SavePretrainedCallback(), data=RegressionData())
