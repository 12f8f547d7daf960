"""Whether responses belong to their prompts: each is read after its own prompt and after that of another sample.

In: batches of tokens, then two losses of each sample. Out: probabilities. Next: `scoring/kinds.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flow_lightning.method.losses import IGNORED

#: The right ones' normal distribution is settled after so many steps of expectation and maximisation.
_STEPS = 50


def swap_prompts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch in which each response follows the prompt of the next row that has another one.

    The first row is next to the last. A prompt is what stands before the first supervised token, without padding. Where
    prompt and response would take more tokens than a row has, the prompt loses its beginning. A row for which there is
    no other prompt, or no room for one, has no supervised tokens.

    Args:
        batch: `input_ids` and `labels` `[B, T]`, as `InstructionDataModule` has them, perhaps with `attention_mask`.

    Returns:
        The same, `[B, T]` each, padded on the right.

    Raises:
        ValueError: If rows hold several samples, joined with `position_ids`.

    >>> ids = torch.tensor([[1, 2, 7], [3, 8, 9]])
    >>> swap_prompts({"input_ids": ids, "labels": torch.tensor([[-100, -100, 7], [-100, 8, 9]])})["input_ids"]
    tensor([[3, 7, 0],
            [2, 8, 9]])
    """
    if "position_ids" in batch:
        raise ValueError("The samples of a row are joined, so prompts cannot be swapped. Score batches with padding.")
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    supervised, width = labels != IGNORED, ids.shape[1]
    starts = supervised.int().argmax(1).tolist()
    ends = (supervised * torch.arange(1, width + 1, device=ids.device)).amax(1).tolist()
    prompts = [row[:start] for row, start in zip(ids, starts)]
    if mask is not None:
        prompts = [prompt[own[: len(prompt)].bool()] for prompt, own in zip(prompts, mask)]
    swapped = {"input_ids": torch.zeros_like(ids), "labels": torch.full_like(labels, IGNORED)}
    swapped |= {} if mask is None else {"attention_mask": torch.zeros_like(mask)}
    for row, (start, end) in enumerate(zip(starts, ends)):
        most = width - (end - start)
        others = (prompts[(row + step) % len(ids)] for step in range(1, len(ids)))
        prompt = next((each for each in others if not torch.equal(each, prompts[row])), ids[row, :0])
        prompt = prompt[max(0, len(prompt) - most) :]
        if len(prompt):
            stop = len(prompt) + end - start
            swapped["input_ids"][row, :stop] = torch.cat([prompt, ids[row, start:end]])
            swapped["labels"][row, len(prompt) : stop] = labels[row, start:end]
            if mask is not None:
                swapped["attention_mask"][row, :stop] = 1
    return swapped


def belongs(gains: Tensor) -> Tensor:
    """Return the probability that each response belongs to its prompt, `[n]` float32.

    A gain is the loss after the prompt of another sample, minus that after its own. If a response does not belong to
    its prompt, both prompts are as good as drawn for it, so its gain is as likely to be negative as positive. Gains of
    those that do belong are taken to be positive. So twice the share of negative gains is the share that does not
    belong. Their gains have a normal distribution around 0, those of the others a normal distribution of their own.

    Args:
        gains: In nats per token, `[n]`; NaN where it is not known.

    >>> belongs(torch.tensor([-0.1, 0.1, 1.0, 1.1, 0.9, 1.0])).round()
    tensor([0., 0., 1., 1., 1., 1.])
    """
    known = gains[gains.isfinite()].double()
    negative = known[known < 0]
    share = min(1.0, 2 * len(negative) / max(1, len(known)))
    if share in (0.0, 1.0):
        return torch.full_like(gains, 1 - share, dtype=torch.float32)
    wrong = share * _normal(known, 0.0, float(negative.square().mean().sqrt()))
    right = (known >= known.median()).double()
    for _ in range(_STEPS):
        mean = float((right * known).sum() / right.sum())
        spread = float(((right * (known - mean).square()).sum() / right.sum()).sqrt())
        density = (1 - share) * _normal(known, mean, max(spread, 1e-6))
        right = density / (density + wrong).clamp_min(1e-300)
    order = known.argsort()  # a larger gain never makes it less probable, however wide the two distributions are
    below, above = (right[order][part] for part in (known[order] < mean, known[order] >= mean))
    right[order] = torch.cat([below.flip(0).cummin(0).values.flip(0), above]).cummax(0).values
    found = torch.full_like(gains, 1 - share, dtype=torch.float32)
    found[gains.isfinite()] = right.float()
    return found


def _normal(values: Tensor, mean: float, spread: float) -> Tensor:
    """Return the density of a normal distribution, but for a factor that all share."""
    return torch.exp(-0.5 * ((values - mean) / spread) ** 2) / spread
