import pickle
import re

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import flow_lightning as fl
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions import prompts
from flow_lightning.data.instructions.dataset import InstructionDataset, collate, join
from flow_lightning.data.instructions.prompts import ALPACA
from flow_lightning.method.losses import supervised_counts
from flow_lightning.scoring.fingerprint import inspect_dataset
from tests.examples import fit
from tests.language import END, TOKENIZER, encode_one, instructions, language_data, language_module, tiny_model


def build(records, **settings):
    return InstructionDataset(records, TOKENIZER, **settings)


def test_the_data_set_holds_what_encode_gives_and_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(prompts, "_TEXTS", 3)
    records = instructions(8)
    dataset = build(records, instruction_field="query", template="Q {instruction} A ", keep_records=True)
    assert re.search("Tokenizing.*8/8", capsys.readouterr().err)
    expected = [encode_one(f"Q {record['query']} A ", record["response"], TOKENIZER) for record in records]
    assert [(s["input_ids"].tolist(), s["prompt_length"]) for s in dataset] == expected
    assert dataset[-1]["input_ids"].tolist() == expected[-1][0] and dataset[0]["input_ids"].dtype == torch.int64
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert dataset.supervised.tolist() == [len(ids) - length for ids, length in expected]
    assert dataset.targets.tolist() == [token for ids, _ in expected for token in ids]
    assert (dataset.truncated, dataset.excluded, dataset.kept) == (0, 0, list(range(8)))
    assert dataset.records == records and build(records).records is None
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]["input_ids"], dataset[3]["input_ids"])


def test_truncation_and_exclusion_are_counted():
    records = [
        {"query": "a" * q, "response": "b" * r} for q, r in ((5, 3), (5, 4), (5, 9), (9, 9), (10, 1), (20, 20), (1, 1))
    ]
    assert len(encode_one("a" * 5, "b" * 4, TOKENIZER)[0]) == 10, "a letter is a token here"
    dataset = build(records, template="{instruction}", max_length=10, keep_records=True)
    assert dataset.kept == [0, 1, 2, 3, 6] and dataset.records == [records[i] for i in dataset.kept]
    assert (dataset.truncated, dataset.excluded) == (2, 2)
    assert dataset.lengths.tolist() == [9, 10, 10, 10, 3] and dataset.supervised.tolist() == [4, 5, 5, 1, 2]
    responses = [TOKENIZER.decode(sample["input_ids"][sample["prompt_length"] :]) for sample in dataset]
    assert responses == [f"bbb{END}", f"bbbb{END}", "bbbbb", "b", f"b{END}"]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match=r"prompts of 3 records leave no token of max_length=4 .*response\. Raise max"):
        build(instructions(3), max_length=4)
    empty = {"query": "?", "response": ""}
    with pytest.raises(
        ValueError, match=r"prompts of 3 records .*The other 2 have an empty 'response'\. Raise max_len"
    ):
        build([empty, *instructions(3), empty], max_length=4)


def test_the_fingerprint_follows_the_texts():
    records = instructions(100)
    changed = [*records[:51], {"query": records[51]["query"], "response": "No."}, *records[52:]]
    first, again, other = (inspect_dataset(IndexedDataset(build(r)))[0] for r in (records, records, changed))
    assert first == again != other


def test_labels_are_the_response_and_its_end_though_the_end_is_also_padding():
    tokenizer, records = TOKENIZER, instructions(6)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = IndexedDataset(build(records))
    batch = collate([dataset[i] for i in (4, 0, 2)], tokenizer.pad_token_id)
    ids, labels = batch["input_ids"], batch["labels"]
    assert batch["index"].tolist() == [4, 0, 2]
    assert ids.shape == labels.shape == (3, int(dataset.dataset.lengths[[4, 0, 2]].max()))
    assert ids.dtype == labels.dtype == batch["index"].dtype == torch.int64
    supervised = labels != -100
    assert torch.equal(labels[supervised], ids[supervised])
    for row, i in enumerate((4, 0, 2)):
        assert tokenizer.decode(labels[row][supervised[row]]) == records[i]["response"] + END
        length = int(dataset.dataset.lengths[i])
        prompt = ids[row, :length][~supervised[row, :length]]
        assert tokenizer.decode(prompt) == ALPACA.replace("{instruction}", records[i]["query"])
        assert (ids[row, length:] == tokenizer.pad_token_id).all() and not supervised[row, length:].any()


def test_empty_responses_are_left_out_and_counted():
    records = instructions(5)
    records[1] = records[1] | {"response": ""}
    records[3] = records[3] | {"response": " \n"}
    dataset = build(records, keep_records=True)
    assert dataset.kept == [0, 2, 4] and dataset.records == [records[i] for i in (0, 2, 4)]
    assert (dataset.empty, dataset.excluded, dataset.truncated) == (2, 0, 0)
    with pytest.raises(ValueError, match=r"All 2 records have an empty 'response'.*Set response_field"):
        build([records[1], records[3]])


def joinable(family, attention):
    """A tiny model of a family: rotary positions, learned ones, or windows that are shorter than the samples."""
    torch.manual_seed(0)
    size = {"vocab_size": len(TOKENIZER), "initializer_range": 0.2, "attn_implementation": attention}
    if family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **size)
        return GPT2LMHeadModel(config)
    size |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "gemma2":
        windows = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
        return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=1, head_dim=16, **windows, **size))
    return LlamaForCausalLM(type(tiny_model(9).config)(num_key_value_heads=1, **size))


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma2", "eager")]
)
def test_joined_samples_have_the_losses_and_gradients_of_padded_ones(tmp_path, family, attention, per):
    data = language_data(tmp_path, 7)
    data.setup("fit")
    samples = [data.train_set[i] for i in (3, 0, 6, 1, 5)] + [{"input_ids": torch.tensor([5]), "prompt_length": 0}]
    samples[-1]["index"] = 2  # nothing of it is supervised: its first token has no prediction
    samples[0]["prompt_length"] = 0
    module, offsets = fl.CausalLanguageModule(joinable(family, attention), TOKENIZER), torch.zeros(8, dtype=torch.long)
    batches = [collate(samples, TOKENIZER.pad_token_id), join(samples)]
    assert batches[1]["input_ids"].shape == (1, sum(len(sample["input_ids"]) for sample in samples))
    offsets[batches[0]["index"] + 1] = supervised_counts(batches[0])
    offsets, flat = offsets.cumsum(0), torch.rand(999) + 0.1
    token_weights = fl.TokenWeights.from_losses(flat[: offsets[-1]], offsets)
    module.sample_weights = token_weights if per == "token" else fl.SampleWeights.from_losses(flat[:7])
    found = []
    for batch in batches:
        module.zero_grad()
        losses = module.training_losses(batch)
        module.weighted_loss(batch, losses).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        found.append([losses, module.sample_losses(batch), module.token_counts(batch), gradient / gradient.norm()])
    assert found[1][2].tolist()[-1] == 0 and found[1][1].shape == (6,)
    for joined, padded in zip(found[1], found[0]):
        torch.testing.assert_close(joined, padded, rtol=1e-5, atol=1e-5)


def test_a_fit_without_padding_ends_where_the_padded_one_does(tmp_path):
    def fit_once(padding_free):
        data = language_data(tmp_path, 13, batch_size=3, padding_free=padding_free)
        module, _ = fit(fl.FlowWeightingCallback(), module=language_module(), data=data, max_epochs=2)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    found, expected = fit_once(True), fit_once(False)
    start = torch.cat([p.detach().flatten() for p in language_module().parameters()])
    assert (found - expected).norm() < 1e-5 * (expected - start).norm()


def test_each_sample_keeps_where_its_own_record_comes_from():
    records = instructions(4)
    records[0]["response"] = " "  # left out, and its source with it
    records[1]["dataset"] = records[3]["dataset"] = "web"
    dataset = build(records, source_field="dataset")
    assert dataset.sources == ["web", "none", "web"] and build(records).sources is None
    assert pickle.loads(pickle.dumps(dataset)).sources == dataset.sources
