"""What can be wrong with instruction data: answers without an end, answers that repeat the prompt, duplicates.

In: a data set of tokens and its tokenizer. Out: findings by sample. Next: `page/text_section.py`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

#: An answer that repeats so many tokens of its prompt, in order, holds it.
_REPEATED = 20
#: Answers of fewer words, such as the letter of a choice, need no end of a sentence.
_FEW_WORDS = 8
#: Samples of which the words are kept, of each kind of finding, and sources of which the names are.
_MOST = 50
_SHOWN = 160
_WIDTH, _ROWS = 128, 1000


def look_at_texts(dataset: Any, tokenizer: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Look at each sample once.

    Args:
        dataset: Gives dicts of `input_ids`, and of `prompt_length` or `labels`.
        tokenizer: Turns tokens into text.

    Returns:
        By sample, `[n]` each: `text/length` of the answer in tokens, `text/unended`, `text/repeats`, and `text/twin`
        with `text/likeness`, see `twins`. And the beginnings of the answers that were found, by index as a string.
    """
    ids, lengths, unended, repeats, texts = [], [], [], [], {}
    for index in tqdm(range(len(dataset)), "Report: reading texts", unit=" samples", leave=False, delay=2):
        sample = dataset[index]
        tokens, start = torch.as_tensor(sample["input_ids"]), answer_start(sample)
        prompt, answer = tokens[:start].tolist(), tokens[start:].tolist()
        text = tokenizer.decode(answer, skip_special_tokens=True)
        ids.append(tokens.int())
        lengths.append(len(answer))
        unended.append(is_unended(text))
        repeats.append(_repeats(prompt, answer))
        texts[index] = text[:_SHOWN]
    twin, likeness = twins(ids)
    flags = {"text/unended": torch.tensor(unended), "text/repeats": torch.tensor(repeats)}
    found = {"text/length": torch.tensor(lengths), **flags, "text/twin": twin, "text/likeness": likeness}
    shown = {index for flag in (*flags.values(), twin >= 0) for index in flag.nonzero().flatten()[:_MOST].tolist()}
    return found, {str(index): texts[index] for index in sorted(shown)}


def source_ranks(sources: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return the rank of each sample's source, 0 the most frequent, int32 `[n]`, and the names of the first 50.

    >>> source_ranks(["web", "book", "book"])
    (tensor([1, 0, 0], dtype=torch.int32), ['book', 'web'])
    """
    names = [name for name, _ in Counter(sources).most_common()]
    ranks = {name: rank for rank, name in enumerate(names)}
    return torch.tensor([ranks[name] for name in sources], dtype=torch.int32), names[:_MOST]


def has_tokens(dataset: Any) -> bool:
    """Tell whether samples are dicts with `input_ids`."""
    return len(dataset) > 0 and isinstance(sample := dataset[0], Mapping) and "input_ids" in sample


def answer_start(sample: Mapping[str, Any]) -> int:
    """Return the position of the first supervised token."""
    if (labels := sample.get("labels")) is None:
        return int(sample.get("prompt_length", 0))
    return int((torch.as_tensor(labels) != -100).int().argmax())


def is_unended(text: str) -> bool:
    """Tell whether an answer of several words ends in the middle of a sentence: in a letter, a comma or a hyphen.

    >>> is_unended("He went to the market and then he"), is_unended("It is 2 and 3 and that makes us 5")
    (True, False)
    """
    text = text.rstrip()
    return len(text.split()) >= _FEW_WORDS and (text[-1].isalpha() or text[-1] in ",-(")


def _repeats(prompt: list[int], answer: list[int]) -> bool:
    known = set(_runs(prompt))
    return any(run in known for run in _runs(answer))


def _runs(tokens: list[int]) -> Iterator[tuple[int, ...]]:
    return (tuple(tokens[i : i + _REPEATED]) for i in range(len(tokens) - _REPEATED + 1))


def twins(ids: Sequence[Tensor], likeness: float = 0.95) -> tuple[Tensor, Tensor]:
    """Find for each text the most similar one before it, if its likeness reaches a bound.

    Likeness is the cosine of the counts of tokens, each weighted by how rare it is (TF-IDF). A random projection to 128
    numbers comes before, which errs by 0.01 at this bound. All pairs are compared: twice the texts take four times
    as long.

    Args:
        ids: Tokens of each text.
        likeness: The bound.

    Returns:
        Its index, -1 for none, and the likeness, `[n]` each.

    >>> twins([torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([1, 2, 3])])[0]
    tensor([-1, -1,  0])
    """
    n, lengths = len(ids), torch.tensor([len(each) for each in ids])
    known, tokens = torch.cat([torch.as_tensor(each) for each in ids]).unique(return_inverse=True)
    owner = torch.repeat_interleave(torch.arange(n), lengths)
    texts = (tokens * n + owner).unique() // n  # a token once for each text that has it
    rare = (n / texts.bincount(minlength=len(known))).log() + 1e-6  # equal texts are alike even if there are no others
    table = torch.randn(len(known), _WIDTH, generator=torch.Generator().manual_seed(0))
    starts = lengths.cumsum(0) - lengths
    weights = rare[tokens].float()
    vectors = F.normalize(F.embedding_bag(tokens, table, starts, mode="sum", per_sample_weights=weights), dim=1)
    best, twin = torch.full((n,), -1.0), torch.full((n,), -1)
    for start in tqdm(range(0, n, _ROWS), "Report: comparing texts", leave=False, delay=2):
        rows = vectors[start : start + _ROWS]
        alike = rows @ vectors[: start + len(rows)].T
        alike[:, start:].tril_(-1)  # 0 from the text itself on
        best[start : start + _ROWS], twin[start : start + _ROWS] = alike.max(1)
    near = best >= likeness
    return torch.where(near, twin, -1), torch.where(near, best, 0.0)
