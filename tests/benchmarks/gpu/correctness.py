"""Losses, weights and gradients of a language model on the device, in each precision, against float64 on the CPU.

In: a small Llama with random parameters. Out: relative errors, with bounds. Next: `processes.py`.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

import flow_lightning as fl
from flow_lightning.data.instructions import join
from tests.benchmarks.gpu.language import llama_of
from tests.benchmarks.gpu.rows import Row, row, skipped

#: How each precision runs: type of autocast, precision of float32 products, and how far losses, weights and gradients
#: may be from float64. Rounding is 2^-24 of a number in float32, 2^-11 in TF32 and fp16, 2^-8 in bf16.
MODES: dict[str, tuple[torch.dtype | None, str, float]] = {
    "fp32": (None, "highest", 1e-5),
    "TF32": (None, "high", 1e-2),
    "fp16": (torch.float16, "highest", 1e-2),
    "bf16": (torch.bfloat16, "highest", 5e-2),
}
#: Gradients in fp16 need a factor, as the Trainer has it, or small ones become 0. A power of two rounds nothing.
_SCALE = 2.0**12


def correctness(device: str, tiny: bool) -> Iterator[Row]:
    """Compare, for each precision, and compiled, with the model's own logits in float64."""
    sizes = (32, 64, 2, 2, 1, 300) if tiny else (512, 1024, 4, 8, 4, 32000)
    model = llama_of(sizes, tied=False, initializer_range=0.05)  # losses that differ, so that weights do
    ids = torch.randint(sizes[-1], (4, 16) if tiny else (4, 256))
    expected = _in_float64(model, ids)
    for name, (dtype, precision, bound) in MODES.items():
        if name == "TF32" and device == "cpu":
            yield skipped("TF32", "a CPU has none")
            continue
        torch.set_float32_matmul_precision(precision)
        yield from _errors(name, _ours(model, ids, device, dtype), expected, bound)
    torch.set_float32_matmul_precision("highest")
    bound, backend = MODES["fp32"][2], "eager" if tiny else "inductor"  # to compile takes longer than the tiny mode
    yield from _errors("fp32, compiled", _ours(model, ids, device, None, backend), expected, bound)
    yield from _errors("fp32, joined", _ours(model, ids, device, None, joined=True), expected, bound)
    if device == "cuda":
        model.set_attn_implementation("flex_attention")
        yield from _errors("fp32, joined, flex", _ours(model, ids, device, None, joined=True), expected, 1e-2)
    else:
        yield skipped("fp32, joined, flex", "it has no gradient on a CPU")


def _in_float64(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, ...]:
    """Return losses of tokens, weights and the gradient from the model's own logits, as the paper has them."""
    model = deepcopy(model).double()
    losses = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = torch.exp(-losses.detach() / losses.detach().quantile(0.5))
    (weights * losses).mean().backward()
    return losses.detach(), weights, _gradient(model)


def _ours(
    model: LlamaForCausalLM,
    ids: Tensor,
    device: str,
    dtype: torch.dtype | None,
    backend: str | None = None,
    joined: bool = False,
) -> tuple[Tensor, ...]:
    """Return the same from `CausalLanguageModule` and `SampleWeights`, on the device; compiled by a backend."""
    module = fl.CausalLanguageModule(deepcopy(model)).to(device)
    batch = {"input_ids": ids, "labels": ids}
    if joined:
        batch = join([{"input_ids": sample, "prompt_length": 1, "index": number} for number, sample in enumerate(ids)])
    batch = {name: values.to(device) for name, values in batch.items()}
    token_losses = module.token_losses if backend is None else torch.compile(module.token_losses, backend=backend)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        losses = token_losses(batch)
    found = losses.detach().cpu()
    weights = fl.SampleWeights.from_losses(found).weights.to(device)  # in float32; those of tokens are kept in 16 bits
    (_SCALE * (weights * losses).mean()).backward()
    return found, weights.cpu(), _gradient(module) / _SCALE


def _gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double().cpu() for p in module.parameters() if p.grad is not None])


def _errors(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bound: float) -> list[Row]:
    parts = zip(("losses", "weights", "gradient"), found, expected, strict=True)
    return [row(f"{part}, {name}", float((a - b).norm() / b.norm()), "relative error", bound) for part, a, b in parts]
