import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning import LightningModule, Trainer

from flow_lightning.data import instructions as module
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions import (
    ALPACA,
    InstructionDataModule,
    InstructionDataset,
    collate,
    encode,
    prompt_splitter,
    read_records,
)
from flow_lightning.data.samplers import LengthGroupedSampler
from flow_lightning.optional import import_language
from flow_lightning.scoring.fingerprint import dataset_fingerprint
from tests.language import END, instructions, tiny_tokenizer

FIELDS = ("query", "response")
TRICKY = [
    "",
    " leading",
    "trailing \n",
    "\n\nlines\r\n\t",
    "größer 漢字 العربية",
    "👩‍👩‍👧 🎉",
    "12 345.678",
    "{x} {instruction}",
]
NO_GENERATION_PROMPT = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"


def write_jsonl(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def build(records: list[dict[str, str]], **settings: Any) -> InstructionDataset:
    return InstructionDataset(records, tiny_tokenizer(), **({"progress": False} | settings))


def data_module(tmp_path: Path, n: int = 20, **settings: Any) -> InstructionDataModule:
    source = write_jsonl(tmp_path / "train.jsonl", instructions(n))
    return InstructionDataModule(source, **({"tokenizer": tiny_tokenizer()} | settings))


# Reading


def test_jsonl_json_and_parquet_hold_the_same(tmp_path):
    records = [*instructions(7), *({"query": text, "response": text} for text in TRICKY)]
    write_jsonl(tmp_path / "a.jsonl", records)
    write_jsonl(tmp_path / "a.json", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        assert read_records(tmp_path / f"a.{suffix}", "train", FIELDS) == records
        assert read_records(tmp_path / f"a.{suffix}", "train", FIELDS, limit=3) == records[:3]
        assert read_records(tmp_path / f"a.{suffix}", "train", ["query"], limit=1) == [{"query": records[0]["query"]}]


def test_empty_lines_at_the_end_are_fine(tmp_path):
    path = Path(write_jsonl(tmp_path / "a.jsonl", instructions(2)))
    path.write_text(path.read_text() + "\n \n\n")
    assert read_records(path, "train", FIELDS) == instructions(2)


@pytest.mark.parametrize(("source", "config"), [("org/maths", None), ("org/maths:main", "main")])
def test_a_hub_name_is_loaded_with_configuration_and_split(source, config, monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([record | {"more": 1} for record in instructions(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records(source, "validation", FIELDS) == instructions(5)
    assert asked == [(("org/maths", config), {"split": "validation"})]


def test_a_hub_name_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no file .* local \.jsonl or \.parquet"):
        read_records("nobody/nothing", "train", FIELDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad\.jsonl is empty; expected at least one record"),
        ("\n\n", r"bad\.jsonl is empty"),
        ('{"query": "a", "response": "b"}\n{"query"\n', r"bad\.jsonl, line 2: not JSON .* one JSON object per line"),
        ("\n[1, 2]\n", r"bad\.jsonl, line 2: got a list; expected one JSON object"),
        (
            '{"query": "a", "answer": "b"}',
            r"line 1: no field 'response'; there are 'query', 'answer'\. Set instruction_field and response_field",
        ),
        ("{}", r"no field 'query', 'response'; there are none"),
        ('{"query": "a", "response": 5}', r"line 1: the field 'response' is 5, a int; expected text"),
    ],
)
def test_bad_lines_are_named(content, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "bad.jsonl", "train", FIELDS)


def test_bad_parquet_files_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read as Parquet"):
        read_records(tmp_path / "bad.parquet", "train", FIELDS)
    pyarrow.parquet.write_table(pyarrow.table({"query": ["a", "b"], "response": ["c", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'answer'; there are 'query', 'response'"):
        read_records(tmp_path / "a.parquet", "train", ["query", "answer"])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: the field 'response' is None, a NoneType"):
        read_records(tmp_path / "a.parquet", "train", FIELDS)


def test_missing_files_other_kinds_and_limits_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.jsonl\. Check the path"):
        read_records(tmp_path / "none.jsonl", "train", FIELDS)
    (tmp_path / "a.csv").write_text("query,response\n")
    with pytest.raises(ValueError, match=r"a\.csv is a \.csv; expected \.jsonl, \.json or \.parquet"):
        read_records(tmp_path / "a.csv", "train", FIELDS)
    with pytest.raises(ValueError, match="limit of records is 0; expected at least 1"):
        read_records(tmp_path / "a.jsonl", "train", FIELDS, limit=0)


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ImportError, match=r"'absent_package'.*pip install \"flow-lightning\[language\]\""):
        import_language("absent_package.part")


# Templates and tokens


@pytest.mark.parametrize("response", TRICKY)
@pytest.mark.parametrize("instruction", TRICKY)
def test_decoding_gives_prompt_and_response_back(instruction, response):
    tokenizer = tiny_tokenizer()
    prompt, answer = prompt_splitter("alpaca", tokenizer)(instruction, response)
    ids, length = encode(prompt, answer, tokenizer)
    assert tokenizer.decode(ids[:length]) == ALPACA.replace("{instruction}", instruction)
    assert tokenizer.decode(ids[length:]) == response + END
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_response_that_ends_already_is_not_ended_twice():
    tokenizer = tiny_tokenizer()
    assert encode("Q", f"A{END}", tokenizer) == encode("Q", "A", tokenizer)


def test_the_beginning_is_marked_once_and_the_prompt_not_ended():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"<|begin|> $A {END}", special_tokens=marks)
    assert tokenizer.decode(tokenizer("Q")["input_ids"]) == f"<|begin|>Q{END}"
    ids, length = encode("Q", "A", tokenizer)
    assert (tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:])) == ("<|begin|>Q", f"A{END}")
    ids, _ = encode("<|begin|>Q", f"A{END}\n", tokenizer, chat=True)
    assert tokenizer.decode(ids) == f"<|begin|>QA{END}"


@pytest.mark.parametrize("template", [None, NO_GENERATION_PROMPT])
@pytest.mark.parametrize("response", ["assistant", *TRICKY])
def test_chat_supervises_the_response_alone(response, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    dataset = InstructionDataset(
        [{"query": "Hello {x}", "response": response}], tokenizer, template="chat", progress=False
    )
    ids, length = dataset[0]["input_ids"], dataset[0]["prompt_length"]
    assert tokenizer.decode(ids[:length]) == f"<|user|>\nHello {{x}}{END}\n<|assistant|>\n"
    assert tokenizer.decode(ids[length:]) == response + END


def test_chat_moves_what_precedes_every_response_to_the_prompt():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}U {{ m['content'] }}\n"
        "{% else %}A <think></think>{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A {% endif %}"
    )
    assert prompt_splitter("chat", tokenizer)("1?", "2") == ("U 1?\nA <think></think>", "2\n")
    ids, length = encode("U 1?\nA ", "2\n", tokenizer, chat=True)  # no end of sequence in this template: it is added
    assert tokenizer.decode(ids[length:]) == f"2\n{END}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"needs a tokenizer with a chat template.*template='alpaca'"),
        ("{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}", "does not start with"),
        ("{{ messages[0]['content'] }}", "leaves the response out"),
        (
            "{{ messages[0]['content'] }}"
            "{% if messages | length > 1 %}{% if messages[0]['content'] == '?' %}other{% endif %}"
            "A: {{ messages[1]['content'] }}{% endif %}",
            "does not start with",
        ),
    ],
)
def test_bad_chat_templates_are_explained(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        prompt_splitter("chat", tokenizer)("?", "!")


def test_a_template_without_place_for_the_instruction_is_refused():
    with pytest.raises(ValueError, match=r"'alpacca' does not contain \{instruction\}; expected 'alpaca', 'chat'"):
        build(instructions(1), template="alpacca")


def test_a_tokenizer_without_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*Set tokenizer\.eos_token"):
        encode("Q", "A", tokenizer)


# Data set


def test_the_data_set_holds_what_encode_gives(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 3)
    tokenizer, records = tiny_tokenizer(), instructions(8)
    dataset = build(records, instruction_field="query", template="Q {instruction} A ", keep_records=True)
    expected = [encode(f"Q {record['query']} A ", record["response"], tokenizer) for record in records]
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
    tokenizer = tiny_tokenizer()
    assert len(encode("a" * 5, "b" * 4, tokenizer)[0]) == 10, "a letter is a token here"
    dataset = build(records, template="{instruction}", max_length=10, keep_records=True)
    assert dataset.kept == [0, 1, 2, 3, 6] and dataset.records == [records[i] for i in dataset.kept]
    assert (dataset.truncated, dataset.excluded) == (2, 2)
    assert dataset.lengths.tolist() == [9, 10, 10, 10, 3] and dataset.supervised.tolist() == [4, 5, 5, 1, 2]
    responses = [tokenizer.decode(sample["input_ids"][sample["prompt_length"] :]) for sample in dataset]
    assert responses == [f"bbb{END}", f"bbbb{END}", "bbbbb", "b", f"b{END}"]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="There are no records"):
        build([])
    with pytest.raises(ValueError, match=r"each of the 3 records fills max_length=4 tokens or more.*Raise max_length"):
        build(instructions(3), max_length=4)
    with pytest.raises(ValueError, match="max_length is 1; expected at least 2"):
        build(instructions(3), max_length=1)


def test_the_fingerprint_follows_the_texts():
    records = instructions(100)
    changed = [*records[:51], {"query": records[51]["query"], "response": "No."}, *records[52:]]
    first, again, other = (dataset_fingerprint(IndexedDataset(build(r))) for r in (records, records, changed))
    assert first == again != other


def test_tokenising_shows_a_bar(capsys):
    build(instructions(3), progress=True)
    shown = capsys.readouterr().err
    assert "Tokenizing" in shown and "3/3" in shown
    build(instructions(3), progress=False)
    assert capsys.readouterr().err == ""


# Batches


def test_labels_are_the_response_and_its_end_though_the_end_is_also_padding():
    tokenizer, records = tiny_tokenizer(), instructions(6)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = IndexedDataset(build(records))
    batch = collate([dataset[i] for i in (4, 0, 2)], tokenizer.pad_token_id)
    assert batch["index"].tolist() == [4, 0, 2]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, int(dataset.dataset.lengths[[4, 0, 2]].max()))
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["index"].dtype == torch.int64
    supervised = batch["labels"] != -100
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])
    for row, i in enumerate((4, 0, 2)):
        assert tokenizer.decode(batch["labels"][row][supervised[row]]) == records[i]["response"] + END
        length = int(dataset.dataset.lengths[i])
        prompt = batch["input_ids"][row, :length][~supervised[row, :length]]
        assert tokenizer.decode(prompt) == ALPACA.replace("{instruction}", records[i]["query"])
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        assert not supervised[row, length:].any()


# Data module


@pytest.mark.parametrize("workers", [0, 1])
def test_training_scoring_and_test_loaders(tmp_path, workers):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(9))
    data = data_module(tmp_path, 20, test=test, batch_size=3, limit_test=7, tokens_per_batch=900, num_workers=workers)
    data.setup("fit")
    assert isinstance(data.train_dataloader().sampler, LengthGroupedSampler)
    for loader, n in ((data.train_dataloader(), 20), (data.scoring_dataloader(), 20), (data.test_dataloader(), 7)):
        batches = list(loader)
        assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(n))
        for batch in batches:
            for row, i in zip(batch["input_ids"], batch["index"].tolist()):
                ids = loader.dataset[i]["input_ids"]
                assert torch.equal(row[: len(ids)], ids)
    scoring = [batch["input_ids"].shape for batch in data.scoring_dataloader()]
    assert len(scoring) > 1 and max(b * t for b, t in scoring) <= 900 and scoring[0][1] == max(t for _, t in scoring)
    assert data.test_set.dataset.records == instructions(7) and data.train_set.dataset.records is None
    pickle.dumps(data.train_dataloader().collate_fn)


def test_a_stage_builds_what_it_needs_once(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(3))
    data = data_module(tmp_path, test=test)
    with pytest.raises(RuntimeError, match=r"training set is not there yet; call setup\(\)"):
        data.scoring_dataloader()
    data.setup("test")
    assert data.train_set is None
    data.setup("fit")
    train_set, test_set = data.train_set, data.test_set
    data.setup("fit")
    assert data.train_set is train_set and data.test_set is test_set


def test_without_a_test_set_there_is_no_validation(tmp_path):
    data = data_module(tmp_path)
    data.setup()
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"There is no test set: give InstructionDataModule\(test="):
        data.test_dataloader()


def test_setup_reports_counts(tmp_path, caplog):
    with caplog.at_level("INFO"):
        data = data_module(tmp_path, 20, limit_train=10, max_length=60, template="{instruction}")
        data.setup()
    dataset = data.train_set.dataset
    assert f"Training set: 10 samples, {len(dataset.targets)} tokens, {dataset.supervised.sum()} of" in caplog.text
    assert f"max_length=60: {dataset.truncated} samples" in caplog.text and dataset.truncated > 0


class Recorder(LightningModule):
    """Takes the place of a language model: has its tokenizer, and notes what it is given."""

    def __init__(self, max_positions: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer, self.max_positions = tiny_tokenizer(), max_positions
        self.epochs: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.epochs[-1] += batch["index"].tolist()
        return self.weight

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.validated += batch["index"].tolist()

    def test_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **settings)


def test_a_trainer_gives_the_tokenizer_and_a_new_order_each_epoch(tmp_path):
    data = data_module(tmp_path, 30, tokenizer=None, test=write_jsonl(tmp_path / "test.jsonl", instructions(5)))
    model = Recorder()
    trainer(max_epochs=2, limit_val_batches=1.0).fit(model, data)
    assert [sorted(epoch) for epoch in model.epochs] == [list(range(30))] * 2 and model.epochs[0] != model.epochs[1]
    assert sorted(model.validated) == sorted([*range(5), *range(5)])
    trainer().test(model, data, verbose=False)
    assert len(model.validated) == 15


def test_without_a_test_set_fitting_works(tmp_path):
    model = Recorder()
    trainer(max_epochs=1).fit(model, data_module(tmp_path, tokenizer=None))
    assert len(model.epochs[0]) == 20 and not model.validated


def test_several_processes_share_the_training_samples(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(3))
    shares = []
    for rank in range(2):
        data = data_module(tmp_path, 20, batch_size=3, test=test)
        data.setup()
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=None)
        shares.append([i for batch in data.train_dataloader() for i in batch["index"].tolist()])
        assert data.test_dataloader().batch_size == 3
    assert sorted(shares[0] + shares[1]) == list(range(20)) and len(shares[0]) == len(shares[1])


def test_samples_longer_than_the_model_are_refused(tmp_path):
    data = data_module(tmp_path, tokenizer=None)
    with pytest.raises(
        ValueError, match=r"longest sample of the training set has \d+ tokens.*Set max_length=32 or less"
    ):
        trainer(max_epochs=1).fit(Recorder(max_positions=32), data)


def test_a_missing_tokenizer_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"The tokenizer is not known.*Give InstructionDataModule\(tokenizer="):
        data_module(tmp_path, tokenizer=None).setup()


@pytest.mark.parametrize("name", ["batch_size", "tokens_per_batch"])
def test_bad_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        InstructionDataModule("train.jsonl", **{name: 0})


@pytest.mark.parametrize("pad_token", [None, END])
def test_the_padding_is_the_tokenizers_or_else_the_end(pad_token, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "!", pad_token
    expected = tokenizer.convert_tokens_to_ids(pad_token or "!")
    data = data_module(tmp_path, tokenizer=tokenizer)
    data.setup()
    assert data.train_dataloader().collate_fn.keywords == {"pad_id": expected}


def test_predict_names_what_lets_a_language_model_write(tmp_path):
    with pytest.raises(NotImplementedError, match="text-generation"):
        data_module(tmp_path, 4).predict_dataloader()
