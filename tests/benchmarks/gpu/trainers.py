"""Whole fits of one epoch: this library plain and with weights, transformers' Trainer, and TRL if it is there.

In: word problems and a random model. Out: tokens per second and peak memory of training. Next: `../peers.py`, which
runs the same with other models and data, each in a process of its own.
"""

import tempfile

import torch

import flow_lightning as fl
from tests.benchmarks.gpu.language import model_of
from tests.benchmarks.gpu.rows import Row, memory_row, row, skipped
from tests.benchmarks.peers import BATCH, PEERS, available, data_of, module_of, run
from tests.language import TOKENIZER


def trainers(device: str, tiny: bool) -> list[Row]:
    """Measure one after the other, in bf16 autocast (tiny: in float32)."""
    rows: list[Row] = []
    for name in PEERS:
        if name not in available():
            rows.append(skipped(name, "it cannot be imported"))
            continue
        if tiny and "TRL" in name:
            rows.append(skipped(name, "it takes longer than the tiny mode"))
            continue
        torch.manual_seed(0)
        module = module_of("")
        if not tiny:
            settings = {"learning_rate": module.learning_rate, "schedule": "constant", "warmup": 0.0}
            module = fl.CausalLanguageModule(model_of("135M"), TOKENIZER, **settings)
        samples = 2 * BATCH if tiny else 64 * BATCH
        data = data_of(module, f"generated:arithmetic:{samples}", samples)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            found = run(name, module, data, not tiny, device, folder)
        rows += [row(name, found["tokens"] / found["seconds"], "tokens/s"), memory_row(name, device)]
    return rows
