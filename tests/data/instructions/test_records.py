from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from flow_lightning.data.instructions.records import read_records
from tests.language import TRICKY, instructions, write_jsonl

FIELDS = ("query", "response")


def test_jsonl_json_and_parquet_hold_the_same(tmp_path):
    records = [*instructions(7), *({"query": text, "response": text} for text in TRICKY)]
    write_jsonl(tmp_path / "a.jsonl", records)
    path = Path(write_jsonl(tmp_path / "a.json", records))
    path.write_text(path.read_text() + "\n \n\n")  # empty lines at the end are fine
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        assert read_records(tmp_path / f"a.{suffix}", "train", FIELDS) == records
        assert read_records(tmp_path / f"a.{suffix}", "train", FIELDS, limit=3) == records[:3]
        assert read_records(tmp_path / f"a.{suffix}", "train", ["query"], limit=1) == [{"query": records[0]["query"]}]


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
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no file .* local \.jsonl or \.parquet"):
        read_records("nobody/nothing", "train", FIELDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad\.jsonl is empty \(limit: None\)\. Give a record"),
        ("\n\n", r"bad\.jsonl is empty"),
        ('{"query": "a", "response": "b"}\n{"query"\n', r"bad\.jsonl, line 2: not a JSON object .* object per line"),
        ("\n[1, 2]\n", r"bad\.jsonl, line 2: not a JSON object \('list' object is not a mapping\)"),
        (
            '{"query": 1, "b": "c"}',
            "line 1: no text in 'query', 'response'; .*'query': 'int', 'b': 'str'.*Set instruct",
        ),
        ('{"query": "a", "response": 5}', "line 1: no text in 'response'; .*'response': 'int'"),
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
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 1: no text in 'answer'; .*'query': 'str', 'response': 'str'"
    ):
        read_records(tmp_path / "a.parquet", "train", ["query", "answer"])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: no text in 'response'; .*'response': 'NoneType'"):
        read_records(tmp_path / "a.parquet", "train", FIELDS)


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("none.jsonl", None, r"No such file .*/none\.jsonl"),
        ("none.parquet", None, r"none\.parquet"),
        ("a.csv", None, r"a\.csv is a \.csv\. Give a \.jsonl, \.json or \.parquet"),
        ("generated:arithmetic:5", 0, r"generated:arithmetic:5 is empty \(limit: 0\)"),
        ("generated:algebra:5", None, "Use generated:arithmetic:COUNT"),
    ],
)
def test_missing_files_other_kinds_and_limits_are_explained(name, limit, message, tmp_path):
    (tmp_path / "a.csv").write_text("query,response\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_records(name, "train", FIELDS, limit)


def test_where_a_record_comes_from_is_kept_as_text_if_the_record_says_so(tmp_path):
    records = [{**record, "more": 1} for record in instructions(4)]
    for record, place in zip(records, ("web", 7, None)):  # the last one lacks the field
        record["dataset"] = place
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[1:]), tmp_path / "a.parquet")
    pairs = instructions(4)
    expected = [pairs[0] | {"dataset": "web"}, pairs[1] | {"dataset": "7"}, *pairs[2:]]
    assert read_records(write_jsonl(tmp_path / "a.jsonl", records), "train", FIELDS, None, "dataset") == expected
    assert read_records(tmp_path / "a.parquet", "train", FIELDS, None, "dataset") == expected[1:]
    with pytest.raises(
        ValueError, match=r"a\.jsonl: no record has a value in 'origin'\. The records have 'query', 're"
    ):
        read_records(tmp_path / "a.jsonl", "train", FIELDS, None, "origin")
    message = r"no record has a value in 'dataset'\. The records have 'query', 'response', 'more'\. Set source_field to"
    write_jsonl(tmp_path / "a.jsonl", [record | {"dataset": None} for record in records])
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "a.jsonl", "train", FIELDS, None, "dataset")
