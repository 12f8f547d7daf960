"""Records of instruction and response: from files, the Hugging Face hub, or a program that makes them.

In: a source and the names of its text fields. Out: one dict of texts per record. Next: `prompts.py`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from tqdm.auto import tqdm

from flow_lightning.optional import optional_import
from flow_lightning.quickstart.arithmetic import word_problems

Record = dict[str, str]
Rows = Iterator[tuple[str, Mapping[str, Any]]]  # each with its place, such as a file and a line


def read_records(source: str | Path, split: str, fields: Sequence[str], limit: int | None = None) -> list[Record]:
    """Read the text fields of a data set: a dict for each record.

    Args:
        source: A `.jsonl` or `.json` file (one JSON object per line), a `.parquet` file, the name of a Hugging Face
            data set, optionally with its configuration as `name:config`, or `generated:arithmetic:COUNT` for word
            problems made by a program.
        split: Split of the data set. Files have none.
        fields: Names of the fields to read.
        limit: Number of records to read, from the first. None for all.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If a package of the extra `language` is needed and missing.
        ValueError: If the source cannot be read, is empty, or lacks a field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"The limit of records is {limit}. Give at least 1, or None for all.")
    rows = islice(_rows(str(source), split, fields), limit)
    shown = tqdm(rows, desc=f"Reading {source}", unit=" records", delay=2)
    records = [{field: _text(row[field], field, where) for field in fields} for where, row in shown]
    if not records:
        raise ValueError(f"{source} is empty. Give at least one record with the fields {', '.join(fields)}.")
    return records


def _rows(source: str, split: str, fields: Sequence[str]) -> Rows:
    if source.startswith("generated:"):
        return _generated_rows(source, split)
    path = Path(source)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        if path.is_file():
            raise ValueError(f"{path} is a {path.suffix or 'file without suffix'}. Give a .jsonl, .json or .parquet.")
        return _hub_rows(source, split, fields)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.absolute()}. Check the path in `train` and `test`.")
    return _parquet_rows(path, fields) if path.suffix == ".parquet" else _json_rows(path, fields)


def _generated_rows(source: str, split: str) -> Rows:
    name, _, count = source.removeprefix("generated:").partition(":")
    if name != "arithmetic" or not count.isdecimal():
        raise ValueError(f"There is no data set {source!r}. Use generated:arithmetic:COUNT.")
    # Each split has a seed of its own. Unlike hash(), crc32 is the same in every process.
    records = word_problems(int(count), seed=crc32(split.encode()))
    return ((f"{source}, record {number}", record) for number, record in enumerate(records, start=1))


def _table_rows(tables: Iterable[Any], where: str) -> Rows:
    rows = (row for table in tables for row in table.to_pylist())
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))


def _json_rows(path: Path, fields: Sequence[str]) -> Rows:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}). Write one JSON object per line.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: got a {type(row).__name__}. Write one JSON object per line.")
            _check_fields(row, fields, where)
            yield where, row


def _parquet_rows(path: Path, fields: Sequence[str]) -> Rows:
    parquet, pyarrow = (optional_import(name, "language", "language data") for name in ("pyarrow.parquet", "pyarrow"))
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}). Write the file again.") from error
    with file:
        _check_fields(file.schema_arrow.names, fields, str(path))
        yield from _table_rows(file.iter_batches(columns=list(fields)), str(path))


def _hub_rows(source: str, split: str, fields: Sequence[str]) -> Rows:
    datasets = optional_import("datasets", "language", "language data")
    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the network, the hub, the split, the files: each raises a type of its own
        raise ValueError(
            f"{source!r} is no file (.jsonl, .json, .parquet). Loading it as a Hugging Face data set, split {split!r}, "
            f"failed with {type(error).__name__}: {error}. Check name and split. Without network, download it first or "
            "give a local .jsonl or .parquet file."
        ) from error
    where = f"{source}, split {split!r}"
    _check_fields(dataset.column_names, fields, where)
    return _table_rows(dataset.select_columns(list(fields)).with_format("arrow").iter(1000), where)


def _check_fields(names: Any, fields: Sequence[str], where: str) -> None:
    missing = [field for field in fields if field not in names]
    if missing:
        raise ValueError(
            f"{where}: no field {', '.join(map(repr, missing))}; there are {', '.join(map(repr, names)) or 'none'}. "
            "Set instruction_field and response_field to the fields of the instruction and of the response."
        )


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: the field {field!r} is {value!r:.80}, a {type(value).__name__}, not text. Convert it, or set "
            "instruction_field or response_field to another field."
        )
    return value
