"""Trainers of other libraries, which take the weights of `score`: the example in its docstring."""

from textwrap import dedent
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import flow_lightning as fl
from tests.foreign.project import Project, apart
from tests.language import tiny_tokenizer

N, RATE = 10, 1.0


def network(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "eos_token_id": 0, "bos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **dropout))


def example() -> str:
    """Return the code in the docstring of `score`."""
    lines = (fl.score.__doc__ or "").partition("takes them as a column::\n")[2].splitlines()
    code = dedent("\n".join(lines[: next(i for i, line in enumerate(lines) if "Its `settings`" in line)]))
    assert len([line for line in code.splitlines() if line]) <= 16
    return code


def sft() -> tuple[float, float]:
    """Take one step of two micro-batches with SFTTrainer; return the largest errors of losses and of the step."""
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, len(tokenizer), (5 + i % 4,), generator=generator).tolist() for i in range(N)]
    model, collator = network(len(tokenizer)), DataCollatorForLanguageModeling(pad_token_id=0)
    settings = SFTConfig(
        "run", max_steps=1, per_device_train_batch_size=N // 2, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, bf16=False,
        remove_unused_columns=False, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    names: dict[str, Any] = {"model": model, "dataset": Dataset.from_dict({"input_ids": rows}), "collator": collator}
    names |= {"settings": settings, "torch": torch, "F": F, "fl": fl, "DataLoader": DataLoader}
    names["SFTTrainer"] = type("Tokenized", (SFTTrainer,), {"__init__": _with(SFTTrainer, tokenizer)})
    exec(example(), names)
    names["trainer"].train()
    return compared(model, names["weights"], [torch.tensor(row) for row in rows])


def _with(kind: Any, tokenizer: Any) -> Any:
    """Return the constructor of a trainer, with the tokenizer that it would look for on the hub."""
    return lambda self, *args, **kwargs: kind.__init__(self, *args, processing_class=tokenizer, **kwargs)


def compared(model: Any, weights: Any, rows: list[torch.Tensor]) -> tuple[float, float]:
    """Compare losses and the first step with those of a loop over single sequences, by hand.

    TRL divides by all labels, those of the first tokens too, which have no prediction.
    """
    fresh = network(model.config.vocab_size)
    before = [parameter.detach().clone() for parameter in fresh.parameters()]
    each = [F.cross_entropy(fresh(row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]
    losses = torch.stack([loss.mean() for loss in each]).detach()
    own = torch.exp(-losses / losses.quantile(0.5))
    (torch.stack([weight * loss.sum() for weight, loss in zip(own, each)]).sum() / sum(map(len, rows))).backward()
    steps = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before)]).detach()
    by_hand = torch.cat(
        [-RATE * parameter.grad.flatten() for parameter in fresh.parameters() if parameter.grad is not None]
    )
    return apart(weights.losses, losses), apart(steps, by_hand)


PROJECTS = [Project("trl", "SFTTrainer, one step of two micro-batches", network, list, measured=sft, lines=15)]
