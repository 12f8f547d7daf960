"""How full batches are: the tokens of all samples over the batches' budget, for packing and for simpler ways.

    python -m tests.benchmarks.packing [--data gsm8k/train.jsonl] [--budgets 1024 2048 4096]

Lengths are those of the data, with the Alpaca prompt and a BPE vocabulary of 8,000 trained on it, and of a log-normal
draw: 100,000 samples of median 200 and sigma 0.8, cut to 1,024. Padded batches count their padding into the budget.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flow_lightning.data.instructions.dataset import InstructionDataset
from flow_lightning.data.instructions.records import read_records
from flow_lightning.data.packing import best_fit_batches
from flow_lightning.data.samplers import token_budget_batches
from tests.benchmarks.measure import spread

ROUNDS = 5


def lengths_of(file: Path) -> Tensor:
    """Tokenise the problems of a file; return the tokens of each, `[N]`."""
    records = read_records(str(file), "train", ("question", "answer"), None)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<end>"], **settings)
    tokenizer.train_from_iterator((f"{r['question']} {r['answer']}" for r in records), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return InstructionDataset(records, fast, "question", "answer").lengths


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096])
    arguments = parser.parse_args()
    sources = {"log-normal": log_normal()}
    if arguments.data is not None:
        sources = {arguments.data.parent.name: lengths_of(arguments.data)} | sources
    for name, lengths in sources.items():
        print(f"\n{name}: {len(lengths)} samples, mean {lengths.float().mean():.0f}, most {lengths.max()}\n")
        print("| share of the budget filled |", *(f"{budget:,} |" for budget in arguments.budgets))
        print("|---|", *("---:|" for _ in arguments.budgets), sep="")
        for way, count in WAYS.items():
            shares = [lengths.sum().item() / (count(lengths, budget) * budget) for budget in arguments.budgets]
            print(f"| {way} |", *(f"{share:.2%} |" for share in shares), flush=True)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            best_fit_batches(lengths, arguments.budgets[-1])
            seconds.append(time.perf_counter() - started)
        print(f"\nPacking takes {spread(seconds, 3)} s.")


if __name__ == "__main__":
    main()
