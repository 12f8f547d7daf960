"""Everything that a GPU is to show, in minutes, without network: correctness first, then speed and memory.

    python -m tests.benchmarks.gpu --out FOLDER [--device cuda] [--seconds 120] [--tiny]

Each part runs in a process of its own with a time limit of its own, and its rows are written at once to
`FOLDER/PART.json`; `FOLDER/gpu.md` is the table so far. `--tiny` has sizes for a CPU. Models have random parameters.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import flow_lightning as fl
from flow_lightning.method.losses import cross_entropy, linear_cross_entropy

Row = dict[str, Any]


def row(what: str, value: float, unit: str, bound: float | None = None) -> Row:
    return {"what": what, "value": value, "unit": unit, "bound": bound}


def timed(step: Callable[[], Any], device: str, tiny: bool) -> tuple[float, float]:
    """Return the median seconds of a step after a warm-up, and the peak memory of the device in MiB (0 on a CPU)."""
    seconds = []
    for _ in range(3 if tiny else 12):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return sorted(seconds[1:])[len(seconds[1:]) // 2], peak


def correctness(device: str, tiny: bool) -> list[Row]:
    """Compare losses, weights and gradients on the device in float32 with float64 logits on the CPU."""
    tokens, width, vocabulary = (64, 16, 300) if tiny else (2048, 256, 32000)
    draw = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(size, width, generator=draw) / width**0.5 for size in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=draw)

    def losses_of(dtype: torch.dtype, where: str) -> tuple[Tensor, ...]:
        one, two = (tensor.to(where, dtype, copy=True).requires_grad_() for tensor in (hidden, head))
        if dtype == torch.float64:
            losses = cross_entropy(one @ two.T, targets)
        else:
            losses = linear_cross_entropy(one, two, targets.to(where), chunk_tokens=tokens // 4)
        weights = torch.exp(-losses.detach() / losses.detach().quantile(0.5))
        (weights * losses).mean().backward()
        assert one.grad is not None and two.grad is not None
        return tuple(tensor.detach().double().cpu() for tensor in (losses, weights, one.grad, two.grad))

    found, expected = losses_of(torch.float32, device), losses_of(torch.float64, "cpu")
    names = ("losses", "weights", "gradient of hidden states", "gradient of the head")
    pairs = zip(names, found, expected, strict=True)
    return [row(f"{name}, fp32", float((a - b).norm() / b.norm()), "relative error", 1e-5) for name, a, b in pairs]


def vision(device: str, tiny: bool) -> list[Row]:
    """Measure scoring and training of a convolutional classifier."""
    size, width, batch = (16, 8, 4) if tiny else (128, 128, 256)
    layers = [nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.arange(batch, device=device) % 10
    weights, optimizer = torch.rand(batch, device=device), torch.optim.SGD(model.parameters(), 0.01)

    @torch.no_grad()
    def scoring() -> None:
        cross_entropy(model(images), targets).cpu()

    def step(weights: Tensor | float) -> None:
        optimizer.zero_grad()
        (weights * cross_entropy(model(images), targets)).mean().backward()
        optimizer.step()

    found = {"scoring": scoring, "plain step": lambda: step(1.0), "weighted step": lambda: step(weights)}
    return [row(name, batch / timed(each, device, tiny)[0], "images/s") for name, each in found.items()]


def language(device: str, tiny: bool) -> list[Row]:
    """Measure a step of a language model with the geometry of SmolLM2-135M, with token weights and without."""
    sizes = (32, 64, 2, 2, 1, 300) if tiny else (576, 1536, 30, 9, 3, 49152)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**dict(zip((*names, "vocab_size"), sizes, strict=True)))
    module = fl.CausalLanguageModule(LlamaForCausalLM(config)).to(device)
    shape = (2, 16) if tiny else (8, 512)
    ids = torch.randint(sizes[-1], shape, device=device)
    batch, optimizer = {"input_ids": ids, "labels": ids}, torch.optim.AdamW(module.parameters(), 1e-5)
    weights, half = torch.rand(shape[0] * (shape[1] - 1), device=device), not tiny

    @torch.no_grad()
    def scoring() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            module.token_losses(batch).cpu()

    def step(weights: Tensor | float) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            losses = module.token_losses(batch)
        (weights * losses).mean().backward()
        optimizer.step()

    rows = []
    for name, each in {
        "scoring": scoring,
        "plain step": lambda: step(1.0),
        "weighted step": lambda: step(weights),
    }.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, peak = timed(each, device, tiny)
        rows += [row(name, ids.numel() / seconds, "tokens/s"), row(f"{name}, peak memory", peak, "MiB")]
    return rows


PARTS = {"correctness": correctness, "vision": vision, "language": language}


def table(folder: Path) -> str:
    """Make one Markdown table of the parts that are written."""
    lines = ["| Part | What | Value | Unit | Bound |", "|---|---|---|---|---|"]
    for name in PARTS:
        if (file := folder / f"{name}.json").exists():
            for each in json.loads(file.read_text()):
                bound = "" if each["bound"] is None else f"{each['bound']:g}"
                lines.append(f"| {name} | {each['what']} | {each['value']:.4g} | {each['unit']} | {bound} |")
    return "\n".join(lines) + "\n"


def run_part(arguments: argparse.Namespace) -> None:
    """Run one part here, and write its rows."""
    torch.manual_seed(0)
    rows = PARTS[arguments.part](arguments.device, arguments.tiny)
    (arguments.out / f"{arguments.part}.json").write_text(json.dumps(rows))


def run_all(arguments: argparse.Namespace) -> int:
    """Run each part in a process of its own; return how many failed or came out wrong."""
    failed = 0
    for name in PARTS:
        (arguments.out / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", *sys.argv[1:], "--part", name]
        try:
            code = subprocess.run(command, timeout=arguments.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 1
            print(f"{name} took more than {arguments.seconds} seconds.")
        failed += code != 0
        (arguments.out / "gpu.md").write_text(table(arguments.out))
    print(table(arguments.out))
    return failed + wrong(arguments.out)


def wrong(folder: Path) -> int:
    """Count the values beyond their bound."""
    rows = [
        each for name in PARTS if (file := folder / f"{name}.json").exists() for each in json.loads(file.read_text())
    ]
    return sum(each["bound"] is not None and not each["value"] <= each["bound"] for each in rows)


def main() -> int:
    """Read the options, and run one part or all."""
    parser = argparse.ArgumentParser(description="What a GPU is to show.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of a part")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=list(PARTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part is None:
        return run_all(arguments)
    run_part(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
