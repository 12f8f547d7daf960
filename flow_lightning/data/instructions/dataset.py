"""The tokenised data set, and its batches.

In: records and a tokenizer. Out: samples of tokens, and batches with labels. Next: `module.py`.
"""

import sys
from array import array
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from flow_lightning.data.instructions.prompts import encode, prompt_splitter
from flow_lightning.data.instructions.records import Record
from flow_lightning.method.losses import IGNORED


class InstructionDataset(Dataset[dict[str, Any]]):
    """Hold the tokens of instructions and responses: `{"input_ids": int64 [T], "prompt_length": int}`.

    Samples longer than `max_length` lose their end, and with it the end-of-sequence token. A sample whose prompt alone
    fills `max_length` is left out. So is a sample whose response is empty or blank.

    Attributes:
        targets: All tokens, one sample after the other, int32. Fingerprints of the data set are made from them.
        lengths: Tokens of each sample, int64 `[N]`.
        supervised: Supervised tokens of each sample (response and end of sequence), int64 `[N]`.
        kept: Position of each sample among the records.
        truncated: Number of samples that lost their end and are kept.
        empty: Number of records left out because their response is empty or blank.
        excluded: Number of records left out because their prompt alone fills `max_length`.
        edit_numbers: How many samples were dropped by hand, for `metrics.json`; None if no edits were asked for.
        records: The records of the samples with `keep_records`, otherwise None.
        sources: The value of `source_field` of each sample, "none" where its record has none. None without the field.

    The arguments are those of `InstructionDataModule`; the tokenizer is not kept. ValueError says why no sample is
    left, why the template does not fit, or that the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        instruction_field: str = "query",
        response_field: str = "response",
        template: str = "alpaca",
        max_length: int = 1024,
        keep_records: bool = False,
        source_field: str | None = None,
    ) -> None:
        split = prompt_splitter(template, tokenizer)
        texts = (split(record[instruction_field], record[response_field]) for record in records)
        encoded = tqdm(encode(texts, tokenizer, template == "chat"), "Tokenizing", len(records), unit=" samples")
        # One flat tensor: hundreds of thousands of small ones cost more memory than their tokens.
        tokens, ends, prompt_lengths = array("i"), [0], array("q")
        self.kept: list[int] = []
        self.truncated = self.empty = 0
        for position, (ids, prompt_length) in enumerate(encoded):
            if not records[position][response_field].strip():
                self.empty += 1
            elif prompt_length < max_length:
                self.truncated += len(ids) > max_length
                tokens.extend(ids[:max_length])
                ends.append(len(tokens))
                prompt_lengths.append(prompt_length)
                self.kept.append(position)
        if self.empty == len(records):
            raise ValueError(
                f"All {len(records)} records have an empty {response_field!r}, so there is nothing to train on. Set "
                "response_field to the field that holds the responses."
            )
        if not self.kept:
            others = f" The other {self.empty} have an empty {response_field!r}." if self.empty else ""
            raise ValueError(
                f"The prompts of {len(records) - self.empty} records leave no token of max_length={max_length} for the "
                f"response.{others} Raise max_length, up to the model's positions, or shorten the template."
            )
        self.excluded = len(records) - len(self.kept) - self.empty
        self.targets = torch.frombuffer(tokens, dtype=torch.int32)
        self.prompt_lengths = torch.frombuffer(prompt_lengths, dtype=torch.int64)
        self.offsets = torch.tensor(ends)
        self.lengths = self.offsets.diff()
        self.supervised = self.lengths - self.prompt_lengths
        self.records = [records[position] for position in self.kept] if keep_records else None
        self.edit_numbers: dict[str, int] | None = None
        self.sources: list[str] | None = None
        if source_field is not None:  # interned: millions of samples share a few values
            self.sources = [sys.intern(records[position].get(source_field, "none")) for position in self.kept]

    def part(self, positions: Sequence[int]) -> "InstructionDataset":
        """Return the samples at these positions, in ascending order."""
        chosen, part = torch.zeros(len(self), dtype=torch.bool), copy(self)
        chosen[list(positions)] = True
        part.targets = self.targets[chosen.repeat_interleave(self.lengths)]
        for name in ("prompt_lengths", "lengths", "supervised"):
            setattr(part, name, getattr(self, name)[chosen])
        part.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), part.lengths.cumsum(0)])
        for name in ("kept", "records", "sources"):
            if (values := getattr(self, name)) is not None:
                setattr(part, name, [values[position] for position in chosen.nonzero().flatten().tolist()])
        return part

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = range(len(self))[index]
        start, end = self.offsets[position : position + 2].tolist()
        return {"input_ids": self.targets[start:end].long(), "prompt_length": int(self.prompt_lengths[position])}


def collate(samples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Make a batch of samples, padded on the right: `input_ids` and `labels` `[B, T]`, `index` `[B]`, all int64.

    Labels are not shifted: the label of a supervised token is the token itself, that of any other is -100. Padding is
    known by its position, so the end-of-sequence token is supervised even if it is also the padding token.

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


def join(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Make a batch without padding: the samples one after the other, in one row.

    `input_ids`, `labels` and `position_ids` are `[1, T]`, `index` is `[B]`, all int64. Positions start at 0 in each
    sample: transformers takes from them which tokens may see each other. The first token of a sample is never
    supervised, since the sample before it would predict it.

    Example:
        >>> samples = [{"input_ids": torch.tensor([5, 6, 2]), "prompt_length": 1, "index": i} for i in (7, 3)]
        >>> join(samples)["position_ids"], join(samples)["labels"]
        (tensor([[0, 1, 2, 0, 1, 2]]), tensor([[-100,    6,    2, -100,    6,    2]]))
    """
    ids = torch.cat([sample["input_ids"] for sample in samples])
    positions = torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])
    prompts = torch.cat([torch.arange(len(s["input_ids"])) < max(1, s["prompt_length"]) for s in samples])
    index = torch.tensor([sample["index"] for sample in samples])
    row = {"input_ids": ids, "labels": ids.masked_fill(prompts, IGNORED), "position_ids": positions}
    return {name: values[None] for name, values in row.items()} | {"index": index}
