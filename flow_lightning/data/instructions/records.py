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


def read_records(
    source: str | Path, split: str, fields: Sequence[str], limit: int | None = None, source_field: str | None = None
) -> list[Record]:
    """Read the text fields of the first `limit` records: a dict for each. Files have no splits.

    `source` is what `InstructionDataModule` takes as `train`. Where a record has a value in `source_field`, its dict
    holds that too, as text. ValueError and FileNotFoundError name the file, the line and the field that cannot be read,
    or a `source_field` that no record has.
    """
    rows = tqdm(islice(_rows(str(source), split), limit), desc=f"Reading {source}", unit=" records", delay=2)
    records, known = [], dict[str, None]()
    for where, row in rows:
        record = _texts(row, fields, where)
        if source_field is not None:
            known |= dict.fromkeys(name for name, value in row.items() if value is not None)
            if (value := row.get(source_field)) is not None:
                record[source_field] = str(value)
        records.append(record)
    if not records:
        raise ValueError(f"{source} is empty (limit: {limit}). Give a record with the fields {', '.join(fields)}.")
    if source_field is not None and source_field not in known:
        raise ValueError(
            f"{source}: no record has a value in {source_field!r}. The records have {', '.join(map(repr, known))}. Set "
            "source_field to one of these, or leave it out."
        )
    return records


def _rows(source: str, split: str) -> Rows:
    if source.startswith("generated:"):
        return _generated_rows(source, split)
    path = Path(source).absolute()
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".jsonl", ".json"):
        return _json_rows(path)
    if path.is_file():
        raise ValueError(f"{path} is a {path.suffix or 'file without suffix'}. Give a .jsonl, .json or .parquet.")
    return _hub_rows(source, split)


def _generated_rows(source: str, split: str) -> Rows:
    name, _, count = source.removeprefix("generated:").partition(":")
    if name != "arithmetic" or not count.isdecimal():
        raise ValueError(f"There is no data set {source!r}. Use generated:arithmetic:COUNT.")
    # Each split has a seed of its own. Unlike hash(), crc32 is the same in every process.
    return ((source, record) for record in word_problems(int(count), seed=crc32(split.encode())))


def _json_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield where, {**json.loads(line)}
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{where}: not a JSON object ({error}). Write one JSON object per line.") from error


def _parquet_rows(path: Path) -> Rows:
    parquet = optional_import("pyarrow.parquet", "language", "language data")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}). Write the file again.") from error
    with file:
        yield from _table_rows(file.iter_batches(), str(path))


def _hub_rows(source: str, split: str) -> Rows:
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
    return _table_rows(dataset.with_format("arrow").iter(1000), f"{source}, split {split!r}")


def _table_rows(tables: Iterable[Any], where: str) -> Rows:
    rows = (row for table in tables for row in table.to_pylist())
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))


def _texts(row: Mapping[str, Any], fields: Sequence[str], where: str) -> Record:
    wrong = [field for field in fields if not isinstance(row.get(field), str)]
    if wrong:
        types = {name: type(value).__name__ for name, value in row.items()}
        raise ValueError(
            f"{where}: no text in {', '.join(map(repr, wrong))}; the record has {types}. Set instruction_field and "
            "response_field to fields that hold text."
        )
    return {field: row[field] for field in fields}
