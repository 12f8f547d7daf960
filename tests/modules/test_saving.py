"""The fine-tuned model in its library's format: that library reads from the folder what was trained."""

from pathlib import Path

import pytest
import timm
import torch
from lightning import LightningModule
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import flow_lightning as fl
from flow_lightning.modules.saving import save_pretrained
from tests.examples import LinearRegression, RegressionData, fit, slow
from tests.images import PictureData, tiny_module
from tests.language import language_module

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Timm(LightningModule):
    """A user's own module around a model of timm."""

    def __init__(self, compiled=False):
        super().__init__()
        model = timm.create_model("test_resnet.r160_in1k", num_classes=3)
        self.net = torch.compile(model, backend="eager") if compiled else model
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch["image"]), batch["target"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: tiny_module("test_vit.r160_in1k", model_kwargs={"img_size": 32}), "test_vit.r160_in1k"),
        (Timm, "test_resnet.r160_in1k"),
        slow(lambda: Timm(compiled=True), "test_resnet.r160_in1k"),
    ],
)
def test_timm_loads_a_fine_tuned_model_with_equal_logits(make, name):
    module, _ = fit(fl.SavePretrainedCallback(), module=make(), data=PictureData())
    expected = module.eval()(IMAGES)
    overlay = {"file": "run/model/model.safetensors", "num_classes": 3}
    size = {"img_size": 32} if "vit" in name else {}
    by_file = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **size)
    by_folder = timm.create_model("local-dir:run/model", pretrained=True)
    for model in (by_file, by_folder):
        torch.testing.assert_close(model.eval()(IMAGES), expected)
    assert sorted(path.name for path in Path("run/model").iterdir()) == ["config.json", "model.safetensors"]


class Text(LightningModule):
    """A user's own module around a model of transformers or peft."""

    def __init__(self, lora=False):
        super().__init__()
        model = language_module().model
        self.net = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "q_proj"])) if lora else model
        for parameter in self.net.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)


IDS = torch.arange(1, 9)[None]


def test_transformers_and_peft_load_what_is_theirs():
    plain, lora = Text().eval(), Text(lora=True).eval()
    save_pretrained(plain, "plain")
    plain.net.save_pretrained("base")
    lora.net.get_base_model().config._name_or_path = lora.net.peft_config["default"].base_model_name_or_path = "base"
    save_pretrained(lora, "adapters")
    save_pretrained(lora, "merged", merge=True)
    assert Path("adapters/adapter_model.safetensors").exists() and not Path("merged/adapter_config.json").exists()
    with torch.no_grad():
        for folder, net in (("plain", plain.net), ("merged", lora.net)):
            found = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
            torch.testing.assert_close(found, net(IDS).logits, atol=1e-4, rtol=1e-4)
    adapters = load_file("adapters/adapter_model.safetensors")
    assert adapters and all("lora_" in name for name in adapters)


class Both(Timm):
    """Has parameters beside those of timm's model."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(3, 3)

    def forward(self, x):
        return self.more(self.net(x))


class Tied(LinearRegression):
    """Has one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.again = self.head


@pytest.mark.parametrize(
    ("make", "data"), [(LinearRegression, RegressionData), (Tied, RegressionData), (Both, PictureData)]
)
def test_another_module_is_written_as_its_state(make, data):
    module, _ = fit(fl.SavePretrainedCallback(), module=make(), data=data())
    fresh = make()
    fresh.load_state_dict(load_file("run/model/model.safetensors"))
    torch.testing.assert_close(fresh.state_dict(), module.state_dict(), rtol=0, atol=0)
