"""How full batches are: the tokens of all samples over the batches' budget, for packing and for simpler ways.

    python -m tests.benchmarks.packing [--data gsm8k/train.jsonl] [--budgets "[1024, 2048, 4096]"]
    python -m tests.benchmarks.packing --data gsm8k/train.jsonl --steps 6

Lengths are those of the data, with the Alpaca prompt and a BPE vocabulary of 8,000 trained on it, and of a log-normal
draw: 100,000 samples of median 200 and sigma 0.8, cut to 1,024. Padded batches count their padding into the budget.

With `--steps`: tokens of samples per second in training steps, all ways in turns in each round, on a random Llama of
8.5 million parameters. Each step has about 2,048 tokens.
"""

import time
import timeit
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flow_lightning as fl
from flow_lightning.data.instructions.dataset import InstructionDataset
from flow_lightning.data.instructions.records import read_records
from flow_lightning.data.packing import best_fit_batches
from flow_lightning.data.samplers import token_budget_batches
from tests.benchmarks.measure import spread

ROUNDS = 5


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """Train a BPE vocabulary on the problems of a file."""
    records = read_records(str(file), "train", ("question", "answer"), None)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<end>"], **settings)
    tokenizer.train_from_iterator((f"{r['question']} {r['answer']}" for r in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def lengths_of(file: Path) -> Tensor:
    """Tokenise the problems of a file; return the tokens of each, `[N]`."""
    records = read_records(str(file), "train", ("question", "answer"), None)
    return InstructionDataset(records, tokenizer_of(file), "question", "answer").lengths


def log_normal(count: int = 100_000) -> Tensor:
    """Draw lengths of median 200, from 1 to 1,024."""
    drawn = torch.empty(count).log_normal_(torch.tensor(200.0).log().item(), 0.8, generator=generator(0))
    return drawn.round().long().clamp(1, 1024)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled(lengths: Tensor, budget: int, cost: Callable[[Iterable[int]], int]) -> int:
    """Count the batches of a random order, each as long as its cost is within the budget."""
    batches: list[list[int]] = [[]]
    for length in lengths[torch.randperm(len(lengths), generator=generator(0))].tolist():
        if batches[-1] and cost([*batches[-1], length]) > budget:
            batches.append([])
        batches[-1].append(length)
    return len(batches)


def first_fit(lengths: Tensor, budget: int) -> int:
    """Count the batches of a random order where each sample goes into the first batch that can take it."""
    left = torch.zeros(len(lengths), dtype=torch.long)
    count = 0
    for length in lengths[torch.randperm(len(lengths), generator=generator(0))].tolist():
        found = left[:count] >= length
        place = int(found.byte().argmax()) if found.any() else count
        if place == count:
            left[count], count = budget, count + 1
        left[place] -= length
    return count


#: Ways to make batches, and the number of batches that each makes.
WAYS: dict[str, Callable[[Tensor, int], int]] = {
    "shuffled, padded": lambda lengths, budget: shuffled(lengths, budget, lambda batch: max(batch) * len([*batch])),
    "sorted by length, padded": lambda lengths, budget: len(token_budget_batches(lengths, budget)),
    "shuffled, joined": lambda lengths, budget: shuffled(lengths, budget, sum),
    "first fit, joined": first_fit,
    "best fit (`packed_tokens`)": lambda lengths, budget: len(best_fit_batches(lengths, budget)),
}


#: Ways to make the batches of a step, as settings of the data module.
STEPS: dict[str, dict[str, Any]] = {
    "similar lengths, padded": {},
    "shuffled, padded": {},
    "similar lengths, joined (`padding_free`)": {"padding_free": True},
    "best fit, joined (`packed_tokens`)": {"packed_tokens": 2048},
    "the same, all pairs of a row attended": {"packed_tokens": 2048},
}


def tokens_per_second(way: str, tokenizer: Any, file: Path, seed: int, steps: int) -> float:
    """Train a new model for some steps; return the samples' tokens per second, padding not counted."""
    module = small_module(tokenizer)
    module._joins = way.startswith("the same")  # taken as checked, so attention stays as it is
    fields = {"instruction_field": "question", "response_field": "answer", "validation_fraction": 0}
    data = fl.InstructionDataModule(str(file), tokenizer=tokenizer, batch_size=10, seed=seed, **fields, **STEPS[way])
    data.setup("fit")
    loader, lengths = data.train_dataloader(), data.train_set.dataset.lengths
    if way.startswith("shuffled"):
        loader = DataLoader(data.train_set, 10, shuffle=True, collate_fn=loader.collate_fn, generator=generator(seed))
    batches = list(islice(loader, steps + 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)
    for number, batch in enumerate(batches):
        if number == 1:  # the first step makes the state of the optimizer
            started = time.perf_counter()
        module.weighted_loss(batch, module.training_losses(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return sum(int(lengths[batch["index"]].sum()) for batch in batches[1:]) / seconds


def small_module(tokenizer: Any) -> fl.CausalLanguageModule:
    """Make a random Llama of 8.5 million parameters, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024}
    config = LlamaConfig(**sizes, **heads)
    return fl.CausalLanguageModule(LlamaForCausalLM(config), tokenizer)


def time_steps(file: Path, steps: int) -> None:
    """Print the tokens per second of each way, and the ratio to the first way in the same round."""
    tokenizer, names = tokenizer_of(file), list(STEPS)
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(ROUNDS):
        for name in names[seed % len(names) :] + names[: seed % len(names)]:
            found[name].append(tokens_per_second(name, tokenizer, file, seed, steps))
    print("| step of about 2,048 tokens | tokens per second | ratio |\n|---|---:|---:|")
    for name, speeds in found.items():
        ratios = [speed / first for speed, first in zip(speeds, found[names[0]])]
        print(f"| {name} | {spread(speeds, 0)} | {spread(ratios)} |")


def main(data: Path | None = None, budgets: list[int] = [1024, 2048, 4096], steps: int | None = None) -> None:  # noqa: B006
    """Print how full batches are, or with `steps` time so many training steps instead."""
    if steps is not None:
        time_steps(data, steps)
        return
    sources = {"log-normal": log_normal()}
    if data is not None:
        sources = {data.parent.name: lengths_of(data)} | sources
    for name, lengths in sources.items():
        print(f"\n{name}: {len(lengths)} samples, mean {lengths.float().mean():.0f}, most {lengths.max()}\n")
        print("| share of the budget filled |", *(f"{budget:,} |" for budget in budgets))
        print("|---|", *("---:|" for _ in budgets), sep="")
        for way, count in WAYS.items():
            shares = [lengths.sum().item() / (count(lengths, budget) * budget) for budget in budgets]
            print(f"| {way} |", *(f"{share:.2%} |" for share in shares), flush=True)
        seconds = timeit.repeat(lambda: best_fit_batches(lengths, budgets[-1]), number=1, repeat=ROUNDS)  # noqa: B023
        print(f"\nPacking takes {spread(seconds, 3)} s.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
