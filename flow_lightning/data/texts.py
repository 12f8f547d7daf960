"""General text: plain files, cut into windows of tokens.

In: paths, a tokenizer. Out: samples as `InstructionDataset` has them. Next: `measures/text.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def read_texts(paths: Sequence[str]) -> list[str]:
    """Read plain UTF-8 text files, one text for each path, or raise ValueError.

    The word `packaged` stands for half a megabyte of English prose that comes with CPython, the topics of `help()`. It
    changes a little with each version of Python, so compare within one version only.
    """
    return [_read(path) for path in paths]


def _read(path: str) -> str:
    if path == "packaged":
        from pydoc_data.topics import topics  # half a megabyte

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        text = Path(path).absolute().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Expected plain text; convert it to UTF-8.") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; expected plain text. Leave it out, or write the file again.")
    return text


class TextWindows(Dataset[dict[str, Any]]):
    """Cut texts into windows of tokens: `{"input_ids": int64 [T], "prompt_length": 1, "index": int}`.

    Windows do not overlap and do not go across texts. The first token of each is context only. If the tokenizer starts
    a text with a token of its own (BOS), each window starts with it, because some models need it. A last window of
    fewer than 2 tokens is dropped. The attribute `lengths` has the tokens of each window, int64 `[N]`.

    Args:
        texts: The texts. ValueError if they give no window.
        tokenizer: A tokenizer of transformers; it is not kept.
        window: Most tokens of a window, at least 2 and at most as many as the model has positions.
        limit_tokens: Take the first windows, up to so many tokens in all, at least 2.

    Example:
        >>> def letters(texts, **_):
        ...     return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
        >>> windows = TextWindows(["abcdefg"], letters, window=3)
        >>> windows.lengths.tolist(), windows[1]["input_ids"].tolist()
        ([3, 3], [100, 101, 102])
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Any, window: int = 1024, limit_tokens: int | None = None
    ) -> None:
        self.windows: list[Tensor] = []
        left = sys.maxsize if limit_tokens is None else limit_tokens
        for text in texts:
            for part in _windows(text, tokenizer, window):
                if len(part := part[:left]) >= 2:
                    self.windows.append(part)
                    left -= len(part)
        if not self.windows:
            raise ValueError("The texts have fewer than 2 tokens, so there is nothing to predict. Give longer texts.")
        self.lengths = torch.tensor([len(part) for part in self.windows])

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.windows[index].long(), "prompt_length": 1, "index": index}


def _windows(text: str, tokenizer: Any, window: int) -> list[Tensor]:
    # Not verbose: the tokenizer would warn of texts that are longer than the model allows, which are cut here.
    (ids,) = tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    starts = bos is not None and tokenizer([""], verbose=False)["input_ids"][0][:1] == [bos]
    start = torch.tensor([bos] if starts else [], dtype=torch.int32)
    return [torch.cat([start, part]) for part in torch.tensor(ids, dtype=torch.int32).split(window - len(start))]
