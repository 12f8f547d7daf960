import pickle
import re

import pytest
import torch

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions import prompts
from flow_lightning.data.instructions.dataset import InstructionDataset, collate
from flow_lightning.data.instructions.prompts import ALPACA
from flow_lightning.scoring.fingerprint import inspect_dataset
from tests.language import END, TOKENIZER, encode_one, instructions


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
    with pytest.raises(ValueError, match=r"None of the 3 records .* less than max_length=4 tokens.*Raise max_length"):
        build(instructions(3), max_length=4)


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
