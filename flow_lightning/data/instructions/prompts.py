"""From instruction and response to tokens: templates, and the boundary between prompt and response.

In: texts and a tokenizer. Out: token ids, and how many of them are the prompt's. Next: `dataset.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

Split = Callable[[str, str], tuple[str, str]]
_PLACEHOLDER = "{instruction}"
_PROBE = "flow-lightning-response"
_TEXTS = 1000  # texts that a fast tokenizer gets at once, to share them between its threads


def prompt_splitter(template: str, tokenizer: Any) -> Split:
    """Return the function that turns instruction and response into the prompt and the supervised text.

    A template is "alpaca", "chat" (the tokenizer's chat template), or a text that contains `{instruction}`. ValueError
    says why it cannot be used.

    Example:
        >>> prompt_splitter("Q: {instruction} A:", None)("1 + 1?", "2")
        ('Q: 1 + 1? A:', '2')
    """
    if template == "chat":
        return _chat_splitter(tokenizer)
    text = ALPACA if template == "alpaca" else template
    if _PLACEHOLDER not in text:
        raise ValueError(
            f"The template {template!r} does not contain {_PLACEHOLDER}. Use 'alpaca', 'chat' or a text with it."
        )
    # Not str.format: braces are common in templates with code or formulas.
    return lambda instruction, response: (text.replace(_PLACEHOLDER, instruction), response)


def _chat_splitter(tokenizer: Any) -> Split:
    def render(instruction: str, response: str) -> tuple[str, str]:
        """Return the text of the prompt, and what the conversation with the response adds to it."""
        user, assistant = {"role": "user", "content": instruction}, {"role": "assistant", "content": response}
        prompt: str = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        conversation: str = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        if not conversation.startswith(prompt + header):
            raise ValueError(
                "The chat template writes a conversation that does not start with its prompt, so the response cannot "
                "be separated. Use template='alpaca' or a text of your own with {instruction}."
            )
        return prompt + header, conversation.removeprefix(prompt + header)

    # Some templates put text between their generation prompt and the response: a role header, if they ignore
    # add_generation_prompt, or an empty block of thoughts. It belongs to the prompt; the model need not learn it.
    header = ""
    header, answer, _ = render(_PROBE, _PROBE)[1].partition(_PROBE)
    if not answer:
        raise ValueError("The chat template leaves the response out. Use template='alpaca'.")
    return render


def encode(texts: Iterable[tuple[str, str]], tokenizer: Any, chat: bool = False) -> Iterator[tuple[list[int], int]]:
    """Tokenise each prompt together with its response, as one text, and find the boundary between them.

    The tokens are those of the whole text, so losses are, too. Some tokenizers make one token of the prompt's end and
    the response's beginning: of "A: " and "7", say. Such a token belongs to the response. It is supervised, or a short
    answer would not be learned, and a prompt never shows a part of its answer. In other words, the prompt is what the
    tokens of the whole text and those of the prompt alone have in common at their beginning.

    The whole gets the end-of-sequence token, unless it ends with it. Texts from a chat template (`chat`) hold their
    special tokens already, and what follows the last end-of-sequence token is cut off.

    Yields:
        The token ids of prompt and response, and how many of them are the prompt's.
    """
    end, pairs = end_of_sequence(tokenizer), iter(texts)
    # Not verbose: it would warn of texts longer than the model, which are cut to max_length later.
    tokenise = partial(tokenizer, verbose=False, add_special_tokens=not chat)
    while chunk := list(islice(pairs, _TEXTS)):
        prompts = tokenise([prompt for prompt, _ in chunk])["input_ids"]
        wholes = tokenise([prompt + response for prompt, response in chunk])["input_ids"]
        for prompt, whole in zip(prompts, wholes):
            if not chat and prompt[-1:] == [end]:  # some tokenizers end every text
                prompt = prompt[:-1]
            length = next((at for at, pair in enumerate(zip(prompt, whole)) if pair[0] != pair[1]), len(prompt))
            length = min(length, len(whole))
            prompt, response = whole[:length], whole[length:]
            if chat and end in response:
                response = response[: len(response) - response[::-1].index(end)]
            yield prompt + (response if response[-1:] == [end] else [*response, end]), length


def end_of_sequence(tokenizer: Any) -> int:
    """Return the end-of-sequence token, or raise ValueError if the tokenizer has none."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model cannot learn where a response ends. Set "
            "tokenizer.eos_token to the token that ends the model's texts."
        )
    return end
