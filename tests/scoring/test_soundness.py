"""What is said of the weights, and layers that a pre-trained checkpoint did not have."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning import LightningModule
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import flow_lightning as fl
from flow_lightning.method.weights import SampleWeights
from flow_lightning.scoring.soundness import fresh_layer, in_words
from tests.unchanged import data, fit

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
GPT = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20, "pad_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize(
    ("weighting", "said"),
    [
        ("flow", "FLOW: 2 samples, temperature 1, mean weight 0.368, effective sample size 2 (100 %)."),
        ("posterior", "Weights by posterior: 2 samples, mean weight 0.500, effective sample size 1 (50 %)."),
    ],
)
def test_the_line_about_weights_names_their_rule(weighting: str, said: str) -> None:
    beside = {"right": torch.tensor([1.0, 0.0])}
    weights = SampleWeights.from_losses(torch.ones(2), weighting=weighting, beside=beside)
    assert in_words(weights, weights.summary()) == said


class Holder(nn.Module):
    def __init__(self, network: nn.Module, own: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.own = nn.Sequential(network), own or nn.Identity()


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        ({"model_name": "test_resnet", "num_classes": 3}, "body.0.fc"),
        ({"model_name": "test_resnet"}, ""),
        ({"model_name": "test_resnet", "num_classes": 0}, ""),
        ({"model_name": "test_resnet", "num_classes": 3, "pretrained_cfg_overlay": {"num_classes": 3}}, ""),
        ({"model_name": "test_vit", "num_classes": 3}, "body.0.head"),
    ],
)
def test_timm_knows_the_classes_of_its_checkpoint(settings: dict[str, Any], layer: str) -> None:
    assert fresh_layer(Holder(timm.create_model(**settings))) == layer


@pytest.mark.parametrize(
    ("saved", "loaded", "layer"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), AutoModelForSequenceClassification, "body.0.classifier"),
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), AutoModelForTokenClassification, "body.0.classifier"),
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), AutoModel, ""),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT)), AutoModelForSequenceClassification, "body.0.score"),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT)), AutoModelForCausalLM, ""),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT)).transformer, AutoModelForCausalLM, ""),  # its head is tied
    ],
)
def test_transformers_knows_the_class_that_wrote_its_checkpoint(
    saved: Any, loaded: Any, layer: str, tmp_path: Path
) -> None:
    saved().save_pretrained(tmp_path)
    assert fresh_layer(Holder(loaded.from_pretrained(tmp_path))) == layer


def test_a_layer_beside_a_pretrained_network_is_new() -> None:
    assert fresh_layer(Holder(timm.create_model("test_resnet", num_classes=0), nn.Linear(64, 3))) == "own"
    assert fresh_layer(Holder(nn.Linear(2, 2), nn.Linear(2, 2))) == ""


def test_a_model_made_by_its_configuration_has_no_checkpoint() -> None:
    assert fresh_layer(Holder(GPT2LMHeadModel(GPT2Config(**GPT)))) == ""


class Pictures(LightningModule):
    """A network of timm with a binary loss, which has no level of chance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pictures = batch[0][:, :3, None, None].expand(-1, -1, 32, 32)
        return nn.functional.binary_cross_entropy_with_logits(self.net(pictures)[:, 0], (batch[1] > 0).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_with_a_new_layer_names_it_and_the_cure() -> None:
    with pytest.warns(UserWarning, match=r"had no layer net\.fc.*LinearProbeCallback\(\)"):
        fit(Pictures(), data(), fl.FlowWeightingCallback(), max_steps=1)
