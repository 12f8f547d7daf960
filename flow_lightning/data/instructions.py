"""The instruction data module: pairs of instruction and response, from files or the hub, as tokens for fine-tuning."""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.samplers import FixedBatches, LengthGroupedSampler, token_budget_batches
from flow_lightning.distributed import data_rank
from flow_lightning.optional import import_language
from flow_lightning.quickstart.arithmetic import word_problems
from flow_lightning.resume import ResumableDataLoader

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of Alpaca for an instruction without input."""

IGNORED = -100
"""Label of a token that is not supervised, as torch's cross-entropy and transformers have it."""

_BATCH = 1000  # texts that a fast tokenizer gets at once, to share them between its threads
_GENERATED = "generated:"
_PLACEHOLDER = "{instruction}"
_PROBE = "flow-lightning-response"

Record = dict[str, str]
Split = Callable[[str, str], tuple[str, str]]


def read_records(
    source: str | Path, split: str, fields: Sequence[str], limit: int | None = None, progress: bool = True
) -> list[Record]:
    """Read the text fields of a data set.

    Args:
        source: A `.jsonl` or `.json` file (one JSON object per line), a `.parquet` file, the name of a Hugging Face
            data set, optionally with its configuration as `name:config`, or `generated:arithmetic:COUNT` for word
            problems made by a program.
        split: Split of the data set; files have none.
        fields: Names of the fields to read.
        limit: Read the first so many records only.
        progress: Show a progress bar if it takes longer than 2 seconds.

    Returns:
        One dict of the fields per record.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If a package of the extra `language` is needed and missing.
        ValueError: If the source cannot be read, is empty, or lacks a field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"The limit of records is {limit}; expected at least 1, or None for all.")
    rows = islice(_rows(str(source), split, fields), limit)
    shown = tqdm(rows, desc=f"Reading {source}", unit=" records", delay=2, dynamic_ncols=True, disable=not progress)
    records = [{field: _text(row[field], field, where) for field in fields} for where, row in shown]
    if not records:
        raise ValueError(f"{source} is empty; expected at least one record with the fields {', '.join(fields)}.")
    return records


def _rows(source: str, split: str, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return each row with the place where it stands."""
    if source.startswith(_GENERATED):
        return _generated_rows(source, split)
    path = Path(source)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        if path.is_file():
            raise ValueError(f"{path} is a {path.suffix or 'file without suffix'}; expected .jsonl, .json or .parquet.")
        return _hub_rows(source, split, fields)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.absolute()}. Check the path in `train` and `test`.")
    return _parquet_rows(path, fields) if path.suffix == ".parquet" else _json_rows(path, fields)


def _generated_rows(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, _, count = source.removeprefix(_GENERATED).partition(":")
    if name != "arithmetic" or not count.isdecimal():
        raise ValueError(f"There is no data set {source!r}; expected generated:arithmetic:COUNT.")
    # Splits are made from different seeds; crc32, unlike hash(), is the same in every process.
    records = word_problems(int(count), seed=crc32(split.encode()))
    return ((f"{source}, record {number}", record) for number, record in enumerate(records, start=1))


def _json_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); expected one JSON object per line.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: got a {type(row).__name__}; expected one JSON object per line.")
            _check_fields(row, fields, where)
            yield where, row


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    parquet, pyarrow = import_language("pyarrow.parquet"), import_language("pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); write the file again.") from error
    with file:
        _check_fields(file.schema_arrow.names, fields, str(path))
        rows = (row for batch in file.iter_batches(columns=list(fields)) for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _hub_rows(source: str, split: str, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    datasets = import_language("datasets")
    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the network, the hub, the split, the files: each raises a type of its own
        raise ValueError(
            f"{source!r} is no file (.jsonl, .json, .parquet), and loading it as a Hugging Face data set, split "
            f"{split!r}, failed with {type(error).__name__}: {error}. Check the name and the split; without network, "
            "download it first or give a local .jsonl or .parquet file."
        ) from error
    where = f"{source}, split {split!r}"
    _check_fields(dataset.column_names, fields, where)
    batches = dataset.select_columns(list(fields)).iter(_BATCH)
    rows = (dict(zip(batch, values)) for batch in batches for values in zip(*batch.values()))
    yield from ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))


def _check_fields(found: Any, fields: Sequence[str], where: str) -> None:
    missing = [field for field in fields if field not in found]
    if missing:
        raise ValueError(
            f"{where}: no field {', '.join(map(repr, missing))}; there are {', '.join(map(repr, found)) or 'none'}. "
            "Set instruction_field and response_field to the fields of the instruction and of the response."
        )


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: the field {field!r} is {value!r:.80}, a {type(value).__name__}; expected text. Convert it, or "
            "set instruction_field or response_field to another field."
        )
    return value


def prompt_splitter(template: str, tokenizer: Any) -> Split:
    """Return the function that turns instruction and response into the prompt's text and the supervised text.

    Args:
        template: "alpaca", "chat" (the tokenizer's chat template), or a text that contains `{instruction}`.
        tokenizer: A tokenizer of transformers; only "chat" looks at it.

    Raises:
        ValueError: If the template has no `{instruction}`, or the tokenizer no usable chat template.

    Example:
        >>> prompt_splitter("Q: {instruction} A:", None)("1 + 1?", "2")
        ('Q: 1 + 1? A:', '2')
    """
    if template == "chat":
        return _chat_splitter(tokenizer)
    text = ALPACA if template == "alpaca" else template
    if _PLACEHOLDER not in text:
        raise ValueError(
            f"The template {template!r} does not contain {_PLACEHOLDER}; expected 'alpaca', 'chat' or a text with "
            f"{_PLACEHOLDER} where the instruction goes."
        )
    # Not str.format: braces are common in templates with code or formulas.
    return lambda instruction, response: (text.replace(_PLACEHOLDER, instruction), response)


def _chat_splitter(tokenizer: Any) -> Split:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "template='chat' needs a tokenizer with a chat template, and this one has none. Use template='alpaca', or "
            "set tokenizer.chat_template."
        )
    render = partial(_render, tokenizer)
    _, rest = render(_PROBE, _PROBE)
    if _PROBE not in rest:
        raise ValueError(
            "The chat template leaves the response out, so it cannot be trained on. Use template='alpaca'."
        )
    # What a template puts between its generation prompt and the response (a role header where it ignores
    # add_generation_prompt, an empty block of thoughts) is for the prompt to say, not for the model to learn.
    header = rest[: rest.index(_PROBE)]

    def split(instruction: str, response: str) -> tuple[str, str]:
        prompt, rest = render(instruction, response)
        if not rest.startswith(header):
            raise ValueError(_UNSPLITTABLE)
        return prompt + header, rest.removeprefix(header)

    return split


_UNSPLITTABLE = (
    "The chat template writes a conversation that does not start with its prompt alone, so it is not clear which part "
    "to train on. Use template='alpaca' or a text of your own with {instruction}."
)


def _render(tokenizer: Any, instruction: str, response: str) -> tuple[str, str]:
    """Return the text of the prompt, and what the whole conversation adds to it."""
    user, assistant = {"role": "user", "content": instruction}, {"role": "assistant", "content": response}
    prompt: str = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(_UNSPLITTABLE)
    return prompt, whole.removeprefix(prompt)


def encode(prompt: str, response: str, tokenizer: Any, chat: bool = False) -> tuple[list[int], int]:
    """Tokenise a prompt and its response, each on its own, so that the boundary between them is exact.

    Args:
        prompt: Text that is given.
        response: Text to learn; the end-of-sequence token is added unless it ends with it.
        tokenizer: A tokenizer of transformers.
        chat: The texts are from a chat template: special tokens are in them already, and what follows the last
            end-of-sequence token is cut off.

    Returns:
        The token ids of both, and how many of them are the prompt's.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token.
    """
    return next(_encode_all([(prompt, response)], tokenizer, chat))


def _encode_all(texts: Sequence[tuple[str, str]], tokenizer: Any, chat: bool) -> Iterator[tuple[list[int], int]]:
    end = _end_of_sequence(tokenizer)
    prompts = _tokenise([prompt for prompt, _ in texts], tokenizer, special=not chat)
    responses = _tokenise([response for _, response in texts], tokenizer, special=False)
    for prompt, response in zip(prompts, responses):
        if not chat and prompt[-1:] == [end]:  # some tokenizers end every text
            prompt = prompt[:-1]
        if chat and end in response:
            response = response[: len(response) - response[::-1].index(end)]
        yield prompt + (response if response[-1:] == [end] else [*response, end]), len(prompt)


def _tokenise(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    # Not verbose: it would warn of texts longer than the model, which are cut to max_length later.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _end_of_sequence(tokenizer: Any) -> int:
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where a response ends. Set "
            "tokenizer.eos_token to the token that the model ends its texts with."
        )
    return end


class InstructionDataset(Dataset[dict[str, Any]]):
    """Hold the tokens of instructions and responses: `{"input_ids": int64 [T], "prompt_length": int}`.

    Samples longer than `max_length` lose their end (and with it the end-of-sequence token). Those of which then only
    the prompt is left are excluded.

    Attributes:
        lengths: Tokens of each sample, int64 `[N]`.
        supervised: Supervised tokens of each sample (response and end of sequence), int64 `[N]`.
        kept: Position of each sample among the records.
        truncated: Number of samples that lost their end and are kept.
        excluded: Number of records without a supervised token.
        records: The records of the samples with `keep_records`, otherwise None.

    Args:
        records: Dicts that hold the two fields.
        tokenizer: A tokenizer of transformers; it is not kept.
        instruction_field: Field of the instruction.
        response_field: Field of the response.
        template: "alpaca", "chat" (the tokenizer's chat template), or a text that contains `{instruction}`.
        max_length: Most tokens of a sample.
        progress: Show a progress bar.
        keep_records: Keep the texts, too.

    Raises:
        ValueError: If no sample is left, the template does not fit, or the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        instruction_field: str = "query",
        response_field: str = "response",
        template: str = "alpaca",
        max_length: int = 1024,
        progress: bool = True,
        keep_records: bool = False,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; expected at least 2 tokens: one of prompt, one of response.")
        split = prompt_splitter(template, tokenizer)
        texts = (split(record[instruction_field], record[response_field]) for record in records)
        encoded = _encode_in_batches(texts, len(records), tokenizer, template == "chat", progress)
        self._store(encoded, max_length)
        if not self.kept:
            raise ValueError(_nothing_left(len(records), max_length))
        self.records = [records[position] for position in self.kept] if keep_records else None

    def _store(self, encoded: Iterator[tuple[list[int], int]], max_length: int) -> None:
        # Flat, because hundreds of thousands of small tensors cost more memory than their tokens.
        tokens, ends, prompt_lengths = array("i"), [0], array("q")
        self.kept: list[int] = []
        self.truncated = self.excluded = 0
        for position, (ids, prompt_length) in enumerate(encoded):
            if prompt_length >= max_length:
                self.excluded += 1
                continue
            self.truncated += len(ids) > max_length
            tokens.extend(ids[:max_length])
            ends.append(len(tokens))
            prompt_lengths.append(prompt_length)
            self.kept.append(position)
        self.tokens = torch.from_numpy(np.array(tokens, dtype=np.int32))
        self.offsets = torch.tensor(ends)
        self.prompt_lengths = torch.from_numpy(np.array(prompt_lengths, dtype=np.int64))
        self.lengths = self.offsets.diff()
        self.supervised = self.lengths - self.prompt_lengths

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = range(len(self))[index]
        start, end = self.offsets[position : position + 2].tolist()
        return {"input_ids": self.tokens[start:end].long(), "prompt_length": int(self.prompt_lengths[position])}

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """All tokens, one sample after the other: what a fingerprint of the data set is taken of."""
        flat: npt.NDArray[np.int32] = self.tokens.numpy()
        return flat


def _encode_in_batches(
    texts: Iterator[tuple[str, str]], total: int, tokenizer: Any, chat: bool, progress: bool
) -> Iterator[tuple[list[int], int]]:
    with tqdm(total=total, desc="Tokenizing", unit=" samples", dynamic_ncols=True, disable=not progress) as bar:
        while batch := list(islice(texts, _BATCH)):
            yield from _encode_all(batch, tokenizer, chat)
            bar.update(len(batch))


def _nothing_left(records: int, max_length: int) -> str:
    if records == 0:
        return "There are no records; expected at least one. Check the file or the split."
    return (
        f"The prompt of each of the {records} records fills max_length={max_length} tokens or more, so there is no "
        "response left to train on. Raise max_length, or use a shorter template."
    )


def collate(samples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Join samples to a batch, padded on the right.

    Labels are not shifted: where a token is supervised its label is the token itself, elsewhere -100. Padding is told
    by position, not by `pad_id`, so the end-of-sequence token is supervised even where it is also the padding.

    Args:
        samples: Samples of `IndexedDataset(InstructionDataset(...))`.
        pad_id: Token to pad with.

    Returns:
        `input_ids` int64 `[B, T]`, `labels` int64 `[B, T]` and `index` int64 `[B]`.

    Example:
        >>> sample = {"input_ids": torch.tensor([5, 6, 2]), "prompt_length": 1, "index": 7}
        >>> collate([sample], pad_id=2)["labels"]
        tensor([[-100,    6,    2]])
    """
    shape = (len(samples), max(len(sample["input_ids"]) for sample in samples))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    for row, sample in enumerate(samples):
        ids, start = sample["input_ids"], sample["prompt_length"]
        input_ids[row, : len(ids)] = ids
        labels[row, start : len(ids)] = ids[start:]
    return {"input_ids": input_ids, "labels": labels, "index": torch.tensor([sample["index"] for sample in samples])}


class InstructionDataModule(LightningDataModule):
    """Load pairs of instruction and response for supervised fine-tuning of a language model.

    Only the response and the end-of-sequence token are supervised. Validation looks at the test set.

    Args:
        train: Training data: a `.jsonl` or `.json` file (one JSON object per line), a `.parquet` file, the name of a
            Hugging Face data set, optionally with its configuration as `name:config`, or `generated:arithmetic:COUNT`.
        test: Test data, likewise; None for none.
        instruction_field: Field of the instruction.
        response_field: Field of the response.
        template: "alpaca", "chat" (the tokenizer's chat template), or a text that contains `{instruction}`.
        max_length: Most tokens of a sample; longer ones lose their end.
        batch_size: Training samples per batch and device.
        train_split: Split of a Hugging Face data set to train on.
        test_split: Split of a Hugging Face data set to test on.
        limit_train: Use the first so many training records only.
        limit_test: Use the first so many test records only.
        num_workers: Loader processes; the tokens are in memory, so that none is usually fastest.
        tokens_per_batch: Most tokens, padding included, of a batch in scoring and evaluation.
        tokenizer: A tokenizer of transformers; by default that of the module being trained.
        seed: Seed of the training order.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        instruction_field: str = "query",
        response_field: str = "response",
        template: str = "alpaca",
        max_length: int = 1024,
        batch_size: int = 4,
        train_split: str = "train",
        test_split: str = "test",
        limit_train: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        tokens_per_batch: int = 8192,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        self.train, self.test = train, test
        self.instruction_field, self.response_field = instruction_field, response_field
        self.template, self.max_length, self.batch_size = template, max_length, batch_size
        self.train_split, self.test_split = train_split, test_split
        self.limit_train, self.limit_test = limit_train, limit_test
        self.num_workers, self.tokens_per_batch, self.seed = num_workers, tokens_per_batch, seed
        self.tokenizer = tokenizer
        self.train_set: IndexedDataset | None = None
        self.test_set: IndexedDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what the stage needs, once.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If the data cannot be used; the message says why.
        """
        if self.train_set is None and stage in ("fit", None):
            self.train_set = self._build("Training", self.train, self.train_split, self.limit_train)
        if self.test_set is None and self.test is not None:
            self.test_set = self._build("Test", self.test, self.test_split, self.limit_test, keep_records=True)
        self._check_positions()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, shuffled, with samples of similar length in a batch."""
        dataset = _ready(self.train_set, "training")
        rank, world = data_rank(self.trainer) if self.trainer else (0, 1)
        lengths = dataset.dataset.lengths
        sampler = LengthGroupedSampler(dataset, lengths, self.batch_size, world, rank, self.seed)
        return self._loader(dataset, ResumableDataLoader, batch_size=self.batch_size, sampler=sampler)

    def scoring_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, the longest first, with the `index` they have in training."""
        return self._budget_loader(_ready(self.train_set, "training"))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the test samples, or no loader if there is no test set."""
        return [] if self.test is None else self.test_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Refuse: a language model that is to write is loaded from the run's `model/` with transformers.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "`predict` is for classifiers. To let a fine-tuned language model write, load the folder model/ of its run "
            "with transformers: pipeline('text-generation', model='.../model')."
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test samples, the longest first.

        Raises:
            ValueError: If there is no test set.
        """
        if self.test is None:
            raise ValueError("There is no test set: give InstructionDataModule(test=...) a file or a data set's name.")
        dataset = _ready(self.test_set, "test")
        if self.trainer is not None and self.trainer.world_size > 1:
            # Lightning shares the samples between processes with a sampler of its own, which a list of batches forbids.
            return self._loader(dataset, batch_size=self.batch_size)
        return self._budget_loader(dataset)

    def _build(
        self, name: str, source: str, split: str, limit: int | None, keep_records: bool = False
    ) -> IndexedDataset:
        progress = self.trainer is None or self.trainer.is_global_zero
        fields = (self.instruction_field, self.response_field)
        records = read_records(source, split, fields, limit, progress)
        dataset = InstructionDataset(
            records, self._tokenizer(), *fields, self.template, self.max_length, progress, keep_records
        )
        rank_zero_info(
            f"{name} set: {len(dataset)} samples, {dataset.tokens.numel()} tokens, {int(dataset.supervised.sum())} of "
            f"them supervised. Cut to max_length={self.max_length}: {dataset.truncated} samples. Excluded, as their "
            f"prompts alone are longer: {dataset.excluded}."
        )
        return IndexedDataset(dataset)

    def _check_positions(self) -> None:
        positions = getattr(getattr(self.trainer, "lightning_module", None), "max_positions", None)
        for name, dataset in (("training", self.train_set), ("test", self.test_set)):
            longest = int(dataset.dataset.lengths.max()) if dataset is not None else 0
            if positions is not None and longest > positions:
                raise ValueError(
                    f"The longest sample of the {name} set has {longest} tokens, but the model has {positions} "
                    f"positions. Set max_length={positions} or less."
                )

    def _tokenizer(self) -> Any:
        known = self.tokenizer
        if known is None:
            known = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if known is None:
            raise ValueError(
                "The tokenizer is not known: none was given, and there is no module with a `tokenizer` to take it "
                "from. Give InstructionDataModule(tokenizer=...)."
            )
        return known

    def _budget_loader(self, dataset: IndexedDataset) -> DataLoader[Any]:
        batches = token_budget_batches(dataset.dataset.lengths, self.tokens_per_batch)
        return self._loader(dataset, batch_sampler=FixedBatches(batches))

    def _loader(
        self, dataset: IndexedDataset, kind: type[DataLoader[Any]] = DataLoader, **batching: Any
    ) -> DataLoader[Any]:
        tokenizer = self._tokenizer()
        pad_id = tokenizer.pad_token_id
        return kind(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=partial(collate, pad_id=_end_of_sequence(tokenizer) if pad_id is None else pad_id),
            pin_memory=torch.cuda.is_available(),
            **batching,
        )


def _ready(dataset: IndexedDataset | None, name: str) -> IndexedDataset:
    if dataset is None:
        raise RuntimeError(f"The {name} set is not there yet; call setup() of the data module first.")
    return dataset
