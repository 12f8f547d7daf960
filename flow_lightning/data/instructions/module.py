"""The instruction data module: data sets of instruction and response for training, validation and test.

In: names of data, and how to tokenise them. Out: loaders of tokens and labels. Next: `modules/causal_language.py`.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from flow_lightning.contract import module_contract
from flow_lightning.data.edits import one_file, read_dropped
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions.dataset import InstructionDataset, collate, join
from flow_lightning.data.instructions.prompts import end_of_sequence
from flow_lightning.data.instructions.records import read_records
from flow_lightning.data.label_noise import LabelNoise, with_wrong_responses
from flow_lightning.data.packing import PackedBatches
from flow_lightning.data.samplers import FixedBatches, LengthGroupedSampler, hold_out, token_budget_batches
from flow_lightning.distributed import data_rank, from_rank_zero
from flow_lightning.resume import ResumableDataLoader

#: The sets that each stage needs.
_SETS = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": [], None: ["train", "val", "test"]}
_NAMES = {"train": "training", "val": "validation", "test": "test"}


class InstructionDataModule(LightningDataModule):
    """Load pairs of instruction and response for supervised fine-tuning of a language model.

    Only the response and the end-of-sequence token are supervised. Rank 0 alone downloads, reads and tokenises, in
    `prepare_data`. In `setup` the other processes get the tokens from it.

    Args:
        train: Training data: a `.jsonl` or `.json` file (one JSON object per line), a `.parquet` file, or the name of a
            Hugging Face data set, with a configuration as `name:config`. `generated:arithmetic:COUNT` makes word
            problems.
        test: Test data, in one of the same forms. None for none.
        instruction_field: Field of the instruction.
        response_field: Field of the response.
        template: "alpaca", "chat" (the tokenizer's chat template), or a text that contains `{instruction}`.
        max_length: Most tokens of a sample, or the model's positions if it has fewer. Longer samples lose their end.
        batch_size: Training samples per batch and device.
        train_split: Split of a Hugging Face data set to train on.
        test_split: Split of a Hugging Face data set to test on.
        limit_train: Number of training records to use, from the first. None for all.
        limit_test: Number of test records to use, from the first. None for all.
        tokens_per_batch: Most tokens, padding included, of a batch in scoring and evaluation.
        tokenizer: A tokenizer of transformers. By default that of the module being trained.
        seed: Seed of the training order. By default that of `seed_everything`, or 0 without one.
        validation_fraction: Share of the training records to hold out for validation, in [0, 1). 0 means no validation.
        split_seed: Seed that chooses the records held out.
        padding_free: Whether to join the samples of a training batch into one row without padding. Losses, weights and
            order stay those of the samples. Batches of scoring and evaluation are sorted by length, and stay padded.
        packed_tokens: Most tokens of a training batch, in place of `batch_size`. Samples are packed by best fit and
            joined as by `padding_free`, each with its own loss. A longer sample is a batch of its own.
        label_noise: Gives some training records the response of another one, held-out ones too, for experiments.
        source_field: Field that says where a record comes from, such as "dataset". `ReportCallback` then shows losses
            by source. Records without a value there count as "none"; if no record has one, ValueError says so.
        edits: A CSV file that drops training samples: `text_issues.csv` of a run with a column `action`, see
            `flow_lightning.data.edits.read_dropped`. Its indices count the training samples of that run, without those
            held out. `--relabel FILE` is the same on the command line.
        drop_issues: The same file, or one without `action`: samples without an action are dropped if they are text
            issues. `--drop-issues FILE` is the same on the command line.

    Raises:
        ValueError: If `edits` and `drop_issues` are both given.
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
        tokens_per_batch: int = 8192,
        tokenizer: Any | None = None,
        seed: int | None = None,
        validation_fraction: float = 0.05,
        split_seed: int = 42,
        padding_free: bool = False,
        packed_tokens: int | None = None,
        label_noise: LabelNoise | None = None,
        source_field: str | None = None,
        edits: str | Path | None = None,
        drop_issues: str | Path | None = None,
    ) -> None:
        super().__init__()
        # Checkpoints hold the arguments, and weights_only=True loads no Path.
        edits, drop_issues = (None if each is None else str(each) for each in (edits, drop_issues))
        self.save_hyperparameters(ignore=["tokenizer", "label_noise"])
        self.prepare_data_per_node = False  # rank 0 sends its tokens to the other nodes as well
        self.train, self.test = train, test
        self.instruction_field, self.response_field = instruction_field, response_field
        self.template, self.max_length, self.batch_size = template, max_length, batch_size
        self.train_split, self.test_split = train_split, test_split
        self.limit_train, self.limit_test = limit_train, limit_test
        self.tokens_per_batch, self.tokenizer, self.seed = tokens_per_batch, tokenizer, seed
        self.validation_fraction, self.split_seed = validation_fraction, split_seed
        self.padding_free, self.packed_tokens = padding_free, packed_tokens
        self.label_noise, self.source_field = label_noise, source_field
        self.edits, self.drop_issues = one_file(edits, drop_issues), drop_issues is not None
        self.train_set: Any = None
        self.val_set: Any = None
        self.test_set: Any = None
        self._prepared: dict[str, InstructionDataset] = {}

    def prepare_data(self) -> None:
        """Read and tokenise what the trainer is about to use. In a fit callbacks may ask for the test set as well."""
        stage = None if self.trainer is None else self.trainer.state.fn
        for name in self._missing(stage) + (self._missing("test") if stage == "fit" else []):
            self._prepared[name] = self._take(name)

    def setup(self, stage: str | None = None) -> None:
        """Take the sets of a stage from rank 0, which reads them now if `prepare_data` did not."""
        for name in self._missing(stage):
            take = partial(self._take, name)
            dataset = take() if self.trainer is None else from_rank_zero(self.trainer, take)
            setattr(self, f"{name}_set", IndexedDataset(dataset))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, shuffled: packed, or with samples of similar length in a batch."""
        self.setup("fit")
        rank, world = data_rank(self.trainer) if self.trainer else (0, 1)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        lengths, batching = self.train_set.dataset.lengths, {"collate_fn": join}
        if self.packed_tokens is not None:
            packed = PackedBatches(lengths, self.packed_tokens, world, rank, seed)
            return self._loader(self.train_set, ResumableDataLoader, batch_size=None, sampler=packed, **batching)
        sampler = LengthGroupedSampler(self.train_set, lengths, self.batch_size, world, rank, seed)
        batching = batching if self.padding_free else {}
        return self._loader(
            self.train_set, ResumableDataLoader, batch_size=self.batch_size, sampler=sampler, **batching
        )

    def scoring_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, the longest first, with the `index` they have in training."""
        self.setup("fit")
        return self._budget_loader(self.train_set)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the held-out part of the training samples, or no loader with `validation_fraction=0`."""
        self.setup("validate")
        return self._evaluation_loader(self.val_set) if self.validation_fraction else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test samples, the longest first, or raise ValueError if there are none."""
        if self.test is None:
            raise ValueError("There is no test set. Give InstructionDataModule(test=...) a file or a data set's name.")
        self.setup("test")  # for a fit, whose own stage does not need it
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Refuse: a fine-tuned language model writes with transformers."""
        raise NotImplementedError(
            "`predict` is for classifiers. To generate text, load the run's folder model/ with transformers: "
            "pipeline('text-generation', model='.../model')."
        )

    @property
    def sample_sources(self) -> list[str] | None:
        """Where each training sample comes from, by its `index`; None without `source_field`."""
        self.setup("fit")
        return self.train_set.dataset.sources  # type: ignore[no-any-return]

    @property
    def edit_numbers(self) -> dict[str, int] | None:
        """How many training samples the edits dropped, known after `setup`; for `metrics.json`."""
        return None if self.train_set is None else self.train_set.dataset.edit_numbers

    def _missing(self, stage: str | None) -> list[str]:
        """Return the names of the sets that a stage needs, that exist, and that are not set up yet."""
        absent = ["val"] * (self.validation_fraction == 0) + ["test"] * (self.test is None)
        return [name for name in _SETS[stage] if name not in absent and getattr(self, f"{name}_set") is None]

    def _take(self, name: str) -> InstructionDataset:
        return self._prepared.pop(name, None) or self._build(name)

    def _build(self, name: str) -> InstructionDataset:
        fields, is_test = (self.instruction_field, self.response_field), name == "test"
        if is_test:
            records = read_records(str(self.test), self.test_split, fields, self.limit_test)
        else:
            both = read_records(self.train, self.train_split, fields, self.limit_train, self.source_field)
            if self.label_noise is not None:
                both = with_wrong_responses(both, self.response_field, self.label_noise)
            held_out, kept = hold_out(len(both), self.validation_fraction, self.split_seed)
            records = [both[position] for position in (kept if name == "train" else held_out)]
        positions = None if self.trainer is None else module_contract(self.trainer.lightning_module).max_positions
        bound, longest = f"max_length={self.max_length}", self.max_length
        if positions is not None and positions < longest:
            bound, longest = f"the model's {positions} positions", positions
        source_field = None if is_test else self.source_field
        dataset = InstructionDataset(records, self._tokenizer(), *fields, self.template, longest, is_test, source_field)
        rank_zero_info(
            f"{_NAMES[name].capitalize()} set: {len(dataset)} samples, {dataset.targets.numel()} tokens, "
            f"{int(dataset.supervised.sum())} of them supervised. Cut to {bound}: {dataset.truncated} samples. "
            f"Excluded, because the prompt alone fills it: {dataset.excluded}; because the response is empty: "
            f"{dataset.empty}."
        )
        if name == "train" and self.edits is not None:
            edits = read_dropped(self.edits, dataset.targets, len(dataset), drop_issues=self.drop_issues)
            rank_zero_info(f"{self.edits}: {edits}.")
            dataset = dataset.part(edits.kept)
            dataset.edit_numbers = edits.numbers
        return dataset

    def _tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer
        tokenizer = None if self.trainer is None else module_contract(self.trainer.lightning_module).tokenizer
        if tokenizer is None:
            raise ValueError("The tokenizer is not known. Give InstructionDataModule(tokenizer=...).")
        return tokenizer

    def _evaluation_loader(self, dataset: IndexedDataset) -> DataLoader[Any]:
        if self.trainer is not None and self.trainer.world_size > 1:
            # Lightning shares the samples between processes by a sampler of its own, which excludes a batch sampler.
            return self._loader(dataset, batch_size=self.batch_size)
        return self._budget_loader(dataset)

    def _budget_loader(self, dataset: IndexedDataset) -> DataLoader[Any]:
        batches = token_budget_batches(dataset.dataset.lengths, self.tokens_per_batch)
        return self._loader(dataset, batch_sampler=FixedBatches(batches))

    def _loader(self, dataset: Any, kind: type[DataLoader[Any]] = DataLoader, **batching: Any) -> DataLoader[Any]:
        tokenizer = self._tokenizer()
        pad_id = tokenizer.pad_token_id
        padded = partial(collate, pad_id=end_of_sequence(tokenizer) if pad_id is None else pad_id)
        return kind(dataset, pin_memory=torch.cuda.is_available(), **({"collate_fn": padded} | batching))
