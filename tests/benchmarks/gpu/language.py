"""Scoring and training of language models with the geometry of SmolLM2-135M, of Llama 3.2 1B and of Gemma 2 2B.

In: random tokens. Out: tokens per second, peak memory, and shares of the machine's own speed. Next: `trainers.py`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import flow_lightning as fl
from tests.benchmarks.gpu.rows import Row, gemm_peak, memory_row, passes, row, skipped, timed

_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TINY = (32, 64, 2, 2, 1, 300)
#: Width, width within a block, blocks, heads, heads of keys, vocabulary.
GEOMETRIES = {
    "135M": (576, 1536, 30, 9, 3, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "2B": (2304, 9216, 26, 8, 4, 256000),
}


def llama_of(sizes: tuple[int, ...], tied: bool = True, **settings: Any) -> LlamaForCausalLM:
    """Make a Llama with random parameters, and with tied embeddings or not."""
    return LlamaForCausalLM(LlamaConfig(**_named(sizes), tie_word_embeddings=tied, **settings))


def model_of(geometry: str, tiny: bool = False) -> PreTrainedModel:
    """Make a model with random parameters: 2B is a Gemma 2, with bounded logits and heads wider than its width says."""
    sizes = _TINY if tiny else GEOMETRIES[geometry]
    if geometry == "2B":
        return Gemma2ForCausalLM(Gemma2Config(**_named(sizes), head_dim=32 if tiny else 256))
    return llama_of(sizes)


def _named(sizes: tuple[int, ...]) -> dict[str, int]:
    return dict(zip((*_NAMES, "vocab_size"), sizes, strict=True))


def language(device: str, tiny: bool, geometry: str = "135M") -> Iterator[Row]:
    """Measure scoring, a plain step and a step with token weights, in bf16 autocast (tiny: in float32)."""
    if geometry != "135M" and device == "cpu" and not tiny:
        yield skipped("all of it", f"the {geometry} geometry is for a GPU")
        return
    half, shape = not tiny, (2, 16) if tiny else (8, 512)
    with torch.device(device):  # random numbers for billions of parameters take minutes on a CPU
        model = model_of(geometry, tiny)
    module = fl.CausalLanguageModule(model)
    ids = torch.randint(model.config.vocab_size, shape, device=device)
    batch, optimizer = {"input_ids": ids, "labels": ids}, torch.optim.AdamW(module.parameters(), 1e-5)
    weights = torch.rand(shape[0] * (shape[1] - 1), device=device)

    def losses(step: Callable[..., Tensor] = module.token_losses) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return step(batch)

    seconds = {}
    for name, each in passes(losses, optimizer, weights).items():
        seconds[name] = timed(each, device, tiny)
        yield row(name, ids.numel() / seconds[name], "tokens/s")
        yield memory_row(name, device)
    if tiny:
        yield skipped("scoring, compiled", "compiling takes longer than the tiny mode")
    else:
        compiled = passes(partial(losses, torch.compile(module.token_losses)), optimizer, weights)["scoring"]
        yield row("scoring, compiled", ids.numel() / timed(compiled, device, tiny), "tokens/s")
    peak = gemm_peak(device, tiny, torch.bfloat16 if half else torch.float32)
    yield from _shares(module, shape, seconds, peak)


def _shares(module: torch.nn.Module, shape: tuple[int, int], seconds: dict[str, float], peak: float) -> list[Row]:
    """Return what scoring takes of a step, and what both reach of the machine's matrix products.

    A forward pass takes 2 operations for each parameter and token, and `4 T D` of a layer's attention over T tokens,
    of which a causal model needs half; D is the width of all heads. A step takes three times that. Source: Chowdhery
    et al., arXiv 2204.02311, B.
    """
    config = module.causal_lm.config  # type: ignore[union-attr]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    width = config.num_attention_heads * config.head_dim  # type: ignore[union-attr, operator]
    attention = 2 * config.num_hidden_layers * shape[1] * width  # type: ignore[union-attr, operator]
    forward = shape[0] * shape[1] * (2 * parameters + attention)
    return [
        row("scoring, of a plain step's time", seconds["scoring"] / seconds["plain step"], "share"),
        row("weighted step, of a plain step's time", seconds["weighted step"] / seconds["plain step"], "share"),
        row("measured peak of matrix products", peak / 1e12, "TFLOP/s"),
        row("scoring, of that peak", forward / seconds["scoring"] / peak, "share"),
        row("weighted step, of that peak (MFU)", 3 * forward / seconds["weighted step"] / peak, "share"),
    ]
