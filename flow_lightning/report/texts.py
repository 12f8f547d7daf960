"""What can be wrong with instruction data: answers without an end, answers that repeat the prompt, duplicates.

In: a data set of tokens and its tokenizer. Out: findings by sample, `text_issues.csv`. Next: `page/text_section.py`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from flow_lightning.data.edits import data_fingerprint
from flow_lightning.files import write_csv

TEXT_ISSUES_FILE = "text_issues.csv"

#: An answer that repeats so many tokens of its prompt, in order, holds it.
_REPEATED = 20
#: Answers of fewer words, such as the letter of a choice, need no end of a sentence.
_FEW_WORDS = 8
#: Samples of which the words are kept, of each kind of finding, and sources of which the names are.
_MOST = 50
_SHOWN = 160
#: Numbers of a projected text, and sides of a block of texts that are compared.
_WIDTH, _ROWS, _COLUMNS = 128, 1000, 4000


def look_at_texts(
    dataset: Any, tokenizer: Any, right: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Look at each sample once.

    Args:
        dataset: Gives dicts of `input_ids`, and of `prompt_length` or `labels`.
        tokenizer: Turns tokens into text.
        right: The probability that an answer belongs to its prompt, `[n]`, if that is known.

    Returns:
        By sample, `[n]` each: `text/length` of the answer in tokens, `text/unended`, `text/repeats`, `text/right`, and
        `text/twin` with `text/likeness`, see `twins`. And `answers`, the beginnings of those that were found, by index
        as a string, with the `fingerprint` of all tokens.
    """
    ids, lengths, unended, repeats, texts = [], [], [], [], {}
    for index in tqdm(range(len(dataset)), "Report: reading texts", unit=" samples", leave=False, delay=2):
        sample = dataset[index]
        tokens, start = torch.as_tensor(sample["input_ids"]).cpu().int(), answer_start(sample)
        text = tokenizer.decode(tokens[start:].numpy(), skip_special_tokens=True)  # a list takes twice as long
        ids.append(tokens)
        lengths.append(len(tokens) - start)
        unended.append(is_unended(text))
        repeats.append(repeats_prompt(tokens, start))
        texts[index] = text[:_SHOWN]
    twin, likeness = twins(ids)
    flags = {"text/unended": torch.tensor(unended), "text/repeats": torch.tensor(repeats)}
    found = {"text/length": torch.tensor(lengths), **flags, "text/twin": twin, "text/likeness": likeness}
    found |= {} if right is None else {"text/right": right}
    shown = {
        index
        for flag in (*flags.values(), twin >= 0, is_misplaced(found))
        for index in flag.nonzero().flatten()[:_MOST].tolist()
    }
    answers = {str(index): texts[index] for index in sorted(shown)}
    return found, {"answers": answers, "fingerprint": data_fingerprint("tokens", torch.cat(ids))}


def write_text_issues(
    path: Path,
    found: Mapping[str, Tensor],
    words: Mapping[str, Any],
    losses: Tensor | None = None,
    sources: Sequence[str] | None = None,
) -> None:
    """Write what was found as a CSV table, a row for each text in their order, for a person to read and edit.

    `is_text_issue` is true of an answer without an end, one that repeats its prompt, and a text like an earlier one. In
    a fit that asked for it, `label_score` is the probability that the answer belongs to its prompt, and one below 1/2
    is an issue.

    Args:
        path: The file.
        found: See `look_at_texts`.
        words: The same.
        losses: Of the samples, `[n]`; without them there is no column `loss`.
        sources: Of the samples, `[n]`; without them there is no column `source`.
    """
    unended, repeats, twin = found["text/unended"].bool(), found["text/repeats"].bool(), found["text/twin"]
    indices, is_twin, right = range(len(twin)), (twin >= 0).tolist(), found.get("text/right")
    write_csv(
        path,
        {
            "index": list(indices),
            "is_text_issue": (unended | repeats | (twin >= 0) | is_misplaced(found)).tolist(),
            **({} if right is None else {"label_score": right.tolist()}),
            **({} if losses is None else {"loss": losses.tolist()}),
            "tokens": found["text/length"].tolist(),
            "without_end": unended.tolist(),
            "repeats_prompt": repeats.tolist(),
            "like_sample": [other if near else None for other, near in zip(twin.tolist(), is_twin)],
            "likeness": [like if near else None for like, near in zip(found["text/likeness"].tolist(), is_twin)],
            **({} if sources is None else {"source": sources}),
            "answer": [" ".join(words["answers"].get(str(index), "").split()) for index in indices],
            "fingerprint": [words["fingerprint"]] * len(twin),
        },
    )


def is_misplaced(found: Mapping[str, Tensor]) -> Tensor:
    """Tell which answers look as if they belong to another prompt, `[n]`; none if nobody asked."""
    right = found.get("text/right")
    return torch.zeros(len(found["text/twin"]), dtype=torch.bool) if right is None else right < 0.5


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


def repeats_prompt(tokens: Tensor, start: int) -> bool:
    """Tell whether an answer, the int32 `tokens` from `start` on, repeats 20 tokens of its prompt in order.

    >>> repeats_prompt(torch.tensor([*range(30), 7, *range(5, 25)]).int(), 30)
    True
    """
    # A run of 20 tokens holds a whole one of the answer's pieces of 10; few answers have such a piece of the prompt.
    half, content = _REPEATED // 2, tokens.numpy().tobytes()
    prompt, answer = content[: 4 * start], content[4 * start :]
    pieces = (answer[at : at + 4 * half] for at in range(0, len(answer) - 4 * half + 1, 4 * half))
    if not any(piece in prompt for piece in pieces):
        return False
    known = set(_runs(tokens[:start].tolist()))
    return any(run in known for run in _runs(tokens[start:].tolist()))


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
    vectors, n = projected(ids), len(ids)
    best, twin = torch.zeros(n), torch.full((n,), -1)
    for start in tqdm(range(0, n, _ROWS), "Report: comparing texts", leave=False, delay=2):
        rows = vectors[start : start + _ROWS]
        for first in range(0, start + len(rows), _COLUMNS):  # a block of likenesses stays in the cache
            alike = rows @ vectors[first : min(first + _COLUMNS, start + len(rows))].T
            if first + alike.shape[1] > start:
                alike.tril_(start - first - 1)  # 0 from the text itself on
            most = alike.amax(1)
            better = ((most >= likeness) & (most > best[start : start + _ROWS])).nonzero().flatten()
            best[start + better], twin[start + better] = most[better], first + alike[better].argmax(1)
    return twin, best


def projected(ids: Sequence[Tensor]) -> Tensor:
    """Return the weighted counts of tokens of each text, projected and of length 1, `[n, _WIDTH]`."""
    flat, lengths = torch.cat([torch.as_tensor(each) for each in ids]).int(), torch.tensor([len(each) for each in ids])
    ends = lengths.cumsum(0)
    size = int(flat.max()) + 1
    texts = torch.zeros(size, dtype=torch.long)  # that have a token
    for start in range(0, len(ids), _ROWS):
        some = lengths[start : start + _ROWS]
        owner = torch.repeat_interleave(torch.arange(len(some)), some)
        tokens = flat[ends[start] - some[0] : ends[start + len(some) - 1]]
        texts += ((owner * size + tokens).unique() % size).bincount(minlength=size)
    known = texts.nonzero().flatten()
    rare = (len(ids) / texts[known]).log() + 1e-6  # equal texts are alike even if there are no others
    table = torch.zeros(size, _WIDTH)
    table[known] = rare[:, None] * torch.randn(len(known), _WIDTH, generator=torch.Generator().manual_seed(0))
    return F.normalize(F.embedding_bag(flat, table, (ends - lengths).int(), mode="sum"), dim=1)
