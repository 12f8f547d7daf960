"""Attention within joined samples: the outputs of `sdpa`, from fewer pairs of tokens."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from flow_lightning.modules.joined_attention import NAME, attend_by_sample
from tests.language import TOKENIZER, tiny_model

POSITIONS = torch.cat([torch.arange(length) for length in (9, 1, 14, 6)])[None]
IDS = torch.randint(300, POSITIONS.shape, generator=torch.Generator().manual_seed(0))


def windowed():
    """A model whose window is shorter than the samples."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3TextConfig(
        vocab_size=len(TOKENIZER), num_key_value_heads=1, head_dim=16, initializer_range=0.2, **layers, **size
    )
    return Gemma3ForCausalLM(config)


@pytest.fixture
def lengths(monkeypatch):
    """The tokens of each call of torch's attention."""
    found, own = [], torch.nn.functional.scaled_dot_product_attention

    def counting(query, *args, **settings):
        found.append(query.shape[2])
        return own(query, *args, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    return found


@pytest.mark.parametrize("make", [lambda: tiny_model(len(TOKENIZER)), windowed])
def test_a_joined_row_has_the_outputs_and_gradients_of_sdpa_from_each_sample_alone(make, lengths):
    outputs = []
    for is_ours in (False, True):
        model = make().eval().double()
        if is_ours:
            attend_by_sample(model)
        lengths.clear()
        logits = model(IDS, position_ids=POSITIONS, use_cache=False).logits
        calls, longest = (4, 14) if is_ours else (1, 30)
        assert len(lengths) == 2 * calls and max(lengths) == longest
        logits.square().sum().backward()
        outputs.append([logits, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)


def test_padded_rows_and_models_that_pass_no_positions_go_the_way_of_sdpa(lengths):
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(TOKENIZER), "initializer_range": 0.2}
    model, other = tiny_model(len(TOKENIZER)).eval(), GPT2LMHeadModel(GPT2Config(**size)).eval()
    for each, inputs in ((model, {}), (other, {"position_ids": POSITIONS})):
        expected = each(IDS, **inputs, use_cache=False).logits
        attend_by_sample(each)
        lengths.clear()
        torch.testing.assert_close(each(IDS, **inputs, use_cache=False).logits, expected)
        assert sum(lengths) == 2 * 30


def test_generation_and_a_saved_model_are_as_before(tmp_path):
    model = tiny_model(len(TOKENIZER)).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **settings)
    attend_by_sample(model)
    assert torch.equal(model.generate(IDS, **settings), expected)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_sdpa_elsewhere_than_on_a_cpu_stays_and_says_what_it_costs():
    model = tiny_model(len(TOKENIZER)).to("meta")
    with pytest.warns(UserWarning, match=r"all pairs of a row.*--model.attention flex_attention"):
        attend_by_sample(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow  # it compiles for a minute
def test_flex_attention_keeps_joined_samples_apart():
    model = tiny_model(len(TOKENIZER)).eval()
    ids = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
        model.set_attn_implementation("flex_attention")
        attend_by_sample(model)
        row = model(ids.reshape(1, 36), position_ids=torch.arange(12).repeat(3)[None], use_cache=False).logits
    assert model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(row.view_as(alone), alone, rtol=1e-4, atol=1e-5)


def test_eager_attention_stays():
    model = tiny_model(len(TOKENIZER))
    model.set_attn_implementation("eager")
    attend_by_sample(model)
    assert model.config._attn_implementation == "eager"
