"""Tiny texts and a tiny tokenizer for tests of language models."""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flow_lightning as fl
from flow_lightning.data.instructions.prompts import encode

END = "<|end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Response: <|user|> <|assistant|>",
    "Anna has three apples and buys four more. How many apples does she have now?",
    "She has three plus four, that is seven apples. The answer is: 7",
    "A train goes 60 miles in one hour. How many miles does it go in 5 hours?",
]

#: Texts that are easily lost or changed on the way to tokens and back.
TRICKY = ["", " leading", "trailing \n", "\n\nlines\r\n\t", "größer 漢字 العربية", "👩‍👩‍👧 🎉", "12 345.678"]
TRICKY += ["{x} {instruction}"]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=360, **settings))
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a new byte-level BPE tokenizer of at most 360 tokens; `<|end|>` ends a sequence and pads."""
    settings = {"eos_token": END, "pad_token": END, "chat_template": CHAT_TEMPLATE}
    tokenizer = Tokenizer.from_str(_trained())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings)


def instructions(n: int) -> list[dict[str, str]]:
    """Return `n` different records of varying length."""
    records = []
    for i in range(n):
        steps = " ".join(f"Step {step} is {i + step}." for step in range(i % 5))
        query = f"Anna has {i} apples and buys {i % 7} more. How many apples does she have now?"
        records.append({"query": query, "response": f"{steps} The answer is: {i + i % 7}"})
    return records


def encode_one(prompt, response, tokenizer, chat=False) -> tuple[list[int], int]:
    """Return the tokens of one prompt and response, and how many are the prompt's."""
    return next(encode([(prompt, response)], tokenizer, chat))


def write_jsonl(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def tiny_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Make a small randomly initialised Llama."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    tokens = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **attention, **tokens))


TOKENIZER = tiny_tokenizer()


def language_module(kind=fl.CausalLanguageModule, **settings):
    torch.manual_seed(0)
    return kind(tiny_model(len(TOKENIZER)), TOKENIZER, **({"learning_rate": 1e-2} | settings))


def language_data(tmp_path, n=13, records=None, **settings):
    """Return a data module of `n` training samples, or of these records, none of them held out."""
    source = write_jsonl(tmp_path / "train.jsonl", records or instructions(n))
    settings = {"template": "Q: {instruction} A: ", "tokenizer": TOKENIZER, "validation_fraction": 0} | settings
    return fl.InstructionDataModule(source, **settings)
