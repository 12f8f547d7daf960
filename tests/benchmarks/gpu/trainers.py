"""Whole fits of one epoch: this library, transformers' Trainer, and TRL and unsloth if they are there.

In: word problems and a random model. Out: tokens per second and peak memory of training. Next: `../peers.py`, which
runs the same with other models and data, each in a process of its own.
"""

import gc
import tempfile
from collections.abc import Iterator, Sequence

import torch

import flow_lightning as fl
from tests.benchmarks.gpu.language import model_of
from tests.benchmarks.gpu.rows import Row, failed, memory_row, row, skipped
from tests.benchmarks.peers import BATCH, PEERS, available, data_of, module_of, run
from tests.language import TOKENIZER

_TOGETHER = [name for name in PEERS if name != "unsloth"]


def unsloth(device: str, tiny: bool) -> Iterator[Row]:
    """Measure unsloth apart from the others, because it changes transformers and TRL."""
    if "unsloth" in available():
        yield from trainers(device, tiny, ("unsloth", "unsloth"))
    else:
        yield skipped("unsloth", "it cannot be imported, or there is no GPU")


def trainers(device: str, tiny: bool, fits: Sequence[str] = ("ours", *_TOGETHER)) -> Iterator[Row]:
    """Measure one after the other on one device, in bf16 autocast (tiny: in float32); the first fit warms up."""
    names = available()
    for number, name in enumerate(fits):
        if name not in names:
            yield skipped(name, "it cannot be imported, or needs a GPU")
            continue
        if tiny and "TRL" in name:
            yield skipped(name, "it takes longer than the tiny mode")
            continue
        torch.manual_seed(0)
        module = module_of("")
        if not tiny:
            settings = {"learning_rate": module.learning_rate, "schedule": "constant", "warmup": 0.0}
            with torch.device(device):
                model = model_of("135M")
            module = fl.CausalLanguageModule(model, TOKENIZER, **settings)
        samples = 2 * BATCH if tiny else 32 * BATCH
        data = data_of(module, f"generated:arithmetic:{samples}", samples)
        if device == "cuda":
            gc.collect()  # the fit before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = run(name, module, data, not tiny, device, folder)
        except Exception as error:  # the others are worth having
            yield failed(name, error)
            continue
        if number == 0:
            continue
        yield row(name, found["tokens"] / found["seconds"], "tokens/s")
        yield memory_row(name, device)
        if "scoring" in found:
            yield row(f"{name}, scoring, of an epoch", found["scoring"] / found["seconds"], "share")
