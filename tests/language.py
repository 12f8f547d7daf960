"""Tiny texts and a tiny tokenizer for tests of language models."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flow_lightning as fl

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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most 360 tokens; `<|end|>` ends a sequence and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def instructions(n: int) -> list[dict[str, str]]:
    """Return `n` different records of varying length."""
    return [
        {
            "query": f"Anna has {i} apples and buys {i % 7} more. How many apples does she have now?",
            "response": " ".join(f"Step {step} is {i + step}." for step in range(i % 5))
            + f" The answer is: {i + i % 7}",
        }
        for i in range(n)
    ]


def tiny_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Make a small randomly initialised Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


TOKENIZER = tiny_tokenizer()


def language_module(**settings):
    torch.manual_seed(0)
    return fl.CausalLanguageModule(tiny_model(len(TOKENIZER)), TOKENIZER, **({"learning_rate": 1e-2} | settings))


def language_data(tmp_path, n=13, **settings):
    path = tmp_path / "train.jsonl"
    content = "".join(json.dumps(record) + "\n" for record in instructions(n))
    path.write_text(content)
    return fl.InstructionDataModule(str(path), template="Q: {instruction} A: ", tokenizer=TOKENIZER, **settings)
