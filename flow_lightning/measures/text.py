"""Measures of a language model on text: the loss on held-out instructions, the perplexity of general text.

In: Trainer and module. Out: nats per token, perplexity. Next: `answers.py`, `callbacks/retention.py`.
"""

from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.contract import module_contract
from flow_lightning.data.instructions import collate
from flow_lightning.data.texts import TextWindows, read_texts
from flow_lightning.measures.base import Measure, Metric, Panel, When, check_at_least
from flow_lightning.measures.target import TargetMeasure
from flow_lightning.method.losses import supervised_counts
from flow_lightning.scoring.score import score_dataset


class TargetLoss(TargetMeasure):
    """The loss per token of the held-out instructions: the test set of the data module or the module."""

    metrics = (
        Metric("target/before/loss", "target loss before training", "nats", "down"),
        Metric("target/loss", "target loss", "nats", "down"),
        TargetMeasure.samples,
    )
    panels = (Panel("target loss", "nats", "down", "target/loss"),)

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Find the test set."""
        check_language_model(module, "TargetLoss")
        return super().prepare(trainer, module)

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Measure the loss per supervised token."""
        if self.loader is None:
            return {}
        return {"loss": mean_token_loss(trainer, module, self.loader, f"Target {when}").item()}


class GeneralText(Measure):
    """The perplexity of general text: `exp(sum of -log p / tokens)` over windows of text.

    Args:
        texts: UTF-8 files, or the word `packaged` (see `read_texts`).
        window: Tokens that the model sees at once; at most as many as it has positions.
        limit_tokens: Tokens of text in all; None for all of it.
        batch_size: Windows per forward pass.
    """

    part = "retention"
    metrics = (
        Metric("retention/before/perplexity", "perplexity of general text before training", "number", "down"),
        Metric("retention/after/perplexity", "perplexity of general text", "number", "down"),
        Metric("retention/tokens", "predicted tokens of general text", "tokens"),
    )
    panels = (Panel("perplexity of general text", "number", "down", "retention/after/perplexity"),)
    loader: DataLoader[Any]

    def __init__(
        self, texts: list[str], *, window: int = 1024, limit_tokens: int | None = None, batch_size: int = 8
    ) -> None:
        check_at_least(2, window=window, limit_tokens=limit_tokens)
        check_at_least(1, batch_size=batch_size)
        self.texts, self.window, self.limit_tokens, self.batch_size = texts, window, limit_tokens, batch_size

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Read the texts and cut them into windows of tokens."""
        check_language_model(module, "GeneralText")
        contract = module_contract(module)
        window, tokenizer = min(self.window, contract.max_positions or self.window), contract.tokenizer
        windows = TextWindows(read_texts(self.texts), tokenizer, window, self.limit_tokens)
        pad = partial(collate, pad_id=padding_id(tokenizer))
        self.loader = DataLoader(windows, batch_size=self.batch_size, collate_fn=pad)
        return {"retention/tokens": int((windows.lengths - 1).sum())}

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Measure the perplexity: at least 1, infinite or NaN if the model has diverged."""
        return {"perplexity": mean_token_loss(trainer, module, self.loader, f"General text {when}").exp().item()}


def mean_token_loss(trainer: Trainer, module: LightningModule, loader: DataLoader[Any], description: str) -> Tensor:
    """Compute the mean loss per supervised token of a data set: nats `[]`, float64, the same on every rank."""
    sums, counts = score_dataset(trainer, module, loader, partial(token_sums_and_counts, module), description)
    return sums.sum() / counts.sum()


def check_language_model(module: LightningModule, measure: str) -> None:
    """Refuse a module that has no `token_losses`, with a TypeError."""
    if module_contract(module).token_losses is None:
        raise TypeError(
            f"{type(module).__name__} has no token_losses(batch), so {measure} cannot measure it. Use "
            "CausalLanguageModule, or the measures of images: TargetAccuracy, PretrainedImages."
        )


def padding_id(tokenizer: Any) -> int:
    """Return a padding token. Any will do: padded positions are never supervised."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def token_sums_and_counts(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of the token losses, float64, and the number of supervised tokens of each row, both `[B]`."""
    counts = supervised_counts(batch).cpu()
    losses = module.token_losses(batch).cpu().double()  # some devices have no float64
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.zeros(len(counts), dtype=torch.float64).index_add(0, rows, losses), counts
