"""Generated answers: does the final answer of a worked solution come out right?

In: Trainer, module and a test set with its records. Out: the fraction of right answers. Next: `harness.py`.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flow_lightning.contract import data_contract, module_contract
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.instructions import InstructionDataset
from flow_lightning.distributed import data_rank, gather
from flow_lightning.measures.base import Metric, Panel, When, check_at_least
from flow_lightning.measures.target import TargetMeasure
from flow_lightning.measures.text import check_language_model, padding_id
from flow_lightning.scoring.evaluation import evaluation
from flow_lightning.scoring.score import progress

_GREEDILY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
_MARKS = (re.compile(r"####"), re.compile(r"the answer is", re.IGNORECASE))
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Answers(TargetMeasure):
    """The fraction of test instructions to which the model generates the right final answer, greedily.

    An answer has at most `max_new_tokens` tokens; a batch has `batch_size` prompts.
    """

    metrics = (
        Metric("target/before/exact_match", "right final answers before training", "fraction", "up"),
        Metric("target/exact_match", "right final answers", "fraction", "up"),
        TargetMeasure.samples,
    )
    panels = (Panel("right final answers", "fraction", "up", "target/exact_match"),)

    def __init__(self, *, max_new_tokens: int = 256, batch_size: int = 8) -> None:
        check_at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.prompts: list[Tensor] = []
        self.references: list[str] = []

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Find prompts and reference answers; refuse a test set without them, or too long for the model."""
        check_language_model(module, "Answers")
        facts = super().prepare(trainer, module)
        self.prompts = []
        if self.loader is not None:
            (dataset, records), field = _instructions(self.loader.dataset), data_contract(trainer).response_field
            self.references = [_reference_answer(number, record[field]) for number, record in enumerate(records)]
            self.prompts = [dataset[i]["input_ids"][:length] for i, length in enumerate(dataset.prompt_lengths)]
            longest, positions = max(map(len, self.prompts)), module_contract(module).max_positions
            if positions is not None and longest + self.max_new_tokens > positions:
                raise ValueError(
                    f"The longest prompt has {longest} tokens and an answer up to {self.max_new_tokens}, but the model "
                    f"has {positions} positions. Set max_new_tokens to {max(positions - longest, 1)} or less, or give "
                    "the data module a smaller max_length."
                )
        return facts

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Generate answers and compare the final ones; rank r takes samples r, r + world, r + 2 world, ..."""
        if not self.prompts:
            return {}
        length, (rank, world) = len(self.prompts), data_rank(trainer)
        mine = list(range(rank, length, world))
        # In shards, a model runs on all ranks or on none: a rank with one sample less takes one for nothing.
        spare = [0] if trainer.strategy.restore_checkpoint_after_setup and len(mine) * world < length else []
        answers: dict[int, str] = {}
        ordered = sorted(mine + spare, key=lambda index: -len(self.prompts[index]))  # the longest prompts first
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        show = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with progress(len(batches), f"Answers {when}", show) as bar, evaluation(module):
            for batch in batches:
                prompts = [self.prompts[index] for index in batch]
                answers |= dict(zip(batch, _generate(trainer, module, prompts, self.max_new_tokens)))
                bar.update()
        right = sum(final_answer(answers[index]) == self.references[index] for index in mine)
        (of_all_ranks,) = gather(trainer, [(torch.tensor([right]),)])
        return {"exact_match": int(of_all_ranks.sum()) / length}


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a worked solution, in a form that can be compared; None if there is none.

    It is the rest of the line after the last `####`; without one the rest of the line after the last "The answer is";
    without that the last number. Separators of thousands, dollar signs, and a period at the end do not count, nor do
    zeros at the end of a decimal fraction.

    >>> final_answer("48 + 24 = 72 clips.\n#### 72"), final_answer("The answer is: $1,200.00.")
    ('72', '1200')
    >>> final_answer("She pays 2.50 for 3 of them"), final_answer("I do not know.")
    ('3', None)
    """
    for mark in _MARKS:
        _, *after = mark.split(text)
        if after:
            return _normalised(after[-1].strip(": \n").partition("\n")[0])
    return _normalised((_NUMBER.findall(text) or [""])[-1])


def _normalised(answer: str) -> str | None:
    answer = _THOUSANDS.sub("", answer.replace("$", "")).strip().rstrip(". ")
    if re.fullmatch(r"-?\d*\.\d+", answer):
        answer = answer.rstrip("0").rstrip(".")
    return answer or None


def _instructions(dataset: Any) -> tuple[InstructionDataset, Sequence[dict[str, str]]]:
    """Return the instructions in a test set, numbered once or twice, and their records."""
    while isinstance(dataset, IndexedDataset):
        dataset = dataset.dataset
    if isinstance(dataset, InstructionDataset) and dataset.records is not None:
        return dataset, dataset.records
    raise TypeError(
        f"The test set is a {type(dataset).__name__} without records, so generated answers cannot be compared. Use "
        "InstructionDataModule(test=...), or leave out Answers."
    )


def _reference_answer(number: int, response: str) -> str:
    if (answer := final_answer(response)) is None:
        raise ValueError(
            f"The response of test sample {number} has no final answer: {response!r:.200}. Expected one after '####', "
            "after 'The answer is', or at least a number. Leave out Answers for such data."
        )
    return answer


def _generate(trainer: Trainer, module: LightningModule, prompts: list[Tensor], max_new_tokens: int) -> list[str]:
    """Continue prompts `[T]`, greedily; return the text of what is new."""
    contract = module_contract(module)
    tokenizer, pad = contract.tokenizer, padding_id(contract.tokenizer)
    # On the left, so that each answer follows its prompt.
    ids = pad_sequence(prompts, True, pad, "left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left")
    batch = trainer.strategy.batch_to_device({"input_ids": ids, "attention_mask": mask})
    with trainer.precision_plugin.forward_context():
        output = contract.causal_lm.generate(
            **batch,
            **_GREEDILY,
            **{"max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad},
            use_cache=True,
            synced_gpus=trainer.strategy.restore_checkpoint_after_setup and trainer.world_size > 1,
        )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[no-any-return]
