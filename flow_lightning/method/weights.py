"""Losses of the frozen model with their weights, looked up by sample index while training.

In: losses and a rule. Out: the weights of a batch, and a file. Next: `objective.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from flow_lightning.files import load_tensors, save_tensors, write_bytes, write_parquet
from flow_lightning.method import flow

_BLOCK = 2**20
#: Half precision is used where it moves no weight by more than this.
_TOLERANCE = 1e-3


class _Stored:
    """What weights of samples and weights of tokens have in common: summary, state, file."""

    losses: Tensor
    weights: Any
    temperature: float
    fingerprint: dict[str, str]
    weighting: str
    _tensors: ClassVar[tuple[str, ...]]
    file_format: ClassVar[str]

    def summary(self) -> dict[str, float]:
        """Return temperature, mean weight, effective sample size and quantiles, under their keys in `metrics.json`."""
        return flow.summarise(self.weights, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, so that `torch.load(weights_only=True)` reads them back."""
        tensors = {name: getattr(self, name).cpu() for name in self._tensors}
        settings = {"temperature": self.temperature, "weighting": self.weighting}
        return {**tensors, **settings, "fingerprint": dict(self.fingerprint)}

    def save(self, path: str | Path, beside: Mapping[str, Tensor] | None = None, scored: str = "") -> None:
        """Write a safetensors file, atomically, with further tensors `beside` and what was `scored` to get them."""
        tensors = {name: getattr(self, name) for name in self._tensors} | dict(beside or {})
        words = {"temperature": repr(self.temperature), "weighting": self.weighting, "scored": scored}
        save_tensors(path, self.file_format, tensors, {**words, "fingerprint": json.dumps(self.fingerprint)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; FileNotFoundError or, if it is damaged or something else, a ValueError."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"No weights file at {path}: `score` writes one, and a fit with the callback.")
        try:
            tensors, metadata = load_tensors(path, cls.file_format)
            settings: dict[str, Any] = {
                "temperature": float(metadata["temperature"]),
                "fingerprint": dict(json.loads(metadata["fingerprint"])),
                "weighting": metadata["weighting"],
            }
            loaded = cls(**{name: tensors[name] for name in cls._tensors}, **settings)
            loaded.verify()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a usable weights file: {error}. Delete it and score again.") from error
        return loaded

    def verify(self) -> None:
        """Refuse, with a ValueError, wrong shapes or types, unusable losses, weights that the rule does not give."""


@dataclass
class SampleWeights(_Stored):
    """Losses of the frozen pre-trained model, temperature and weights, by sample index.

    Takes 8 bytes per sample: 80 MB for 10 million.

    Attributes:
        losses: `[n]` float32.
        temperature: tau.
        weights: `[n]` float32, by default `exp(-losses / temperature)`.
        fingerprint: What the losses were computed from, for example `{"dataset": "...", "reference": "..."}`.
        weighting: Name of the rule from losses to weights, see `flow_lightning.method.flow.WEIGHTINGS`.
        lookups: How often `of` was called: training that never looks up a weight is not weighted.
    """

    losses: Tensor
    temperature: float
    weights: Tensor
    fingerprint: dict[str, str] = field(default_factory=dict)
    weighting: str = "flow"
    lookups: int = field(default=0, compare=False)

    _tensors: ClassVar[tuple[str, ...]] = ("losses", "weights")
    file_format: ClassVar[str] = "flow_lightning.SampleWeights/2"

    @classmethod
    def from_losses(
        cls,
        losses: Tensor,
        temperature: float | Literal["mixture"] | None = None,
        quantile: float = 0.5,
        fingerprint: dict[str, str] | None = None,
        weighting: str = "flow",
        beside: Mapping[str, Tensor] | None = None,
    ) -> "SampleWeights":
        """Compute temperature and weights.

        Args:
            losses: `[n]`, not negative.
            temperature: tau; None for the `quantile` of the losses, `mixture` for the median of those that look clean.
            quantile: Which one, in `[0, 1]`.
            fingerprint: See the class.
            weighting: See the class.
            beside: What a linear probe gives beside its losses, for the rules that need it.

        Raises:
            ValueError: If a loss is negative or not finite, tau comes out as 0, or the weighting is unknown.
        """
        flow.check_losses(losses)
        own, tau = _on_cpu(losses, temperature, quantile, weighting)
        weights = flow.weights_by(weighting, own, tau, beside or {})
        return cls(own, tau, weights, dict(fingerprint or {}), weighting)

    def __len__(self) -> int:
        return self.weights.numel()

    def of(self, index: Tensor | Sequence[int]) -> Tensor:
        """Return the weights of a batch, `[B]`, on the device of `index`; the cost does not depend on `len(self)`."""
        self.lookups += 1
        index = index if isinstance(index, Tensor) else torch.as_tensor(index, device=self.weights.device)
        if self.weights.device != index.device:
            self.weights = self.weights.to(index.device)  # once: later batches come from the same device
        return self.weights[index]

    def to_csv(self, path: str | Path) -> None:
        """Write a table of `index`, `loss` and `flow_weight`, in the order of the data set, whose numbers are exact."""
        rows = [f"{i},{loss!s},{weight!s}\n" for i, (loss, weight) in enumerate(zip(*self._columns()))]
        write_bytes(path, "".join(["index,loss,flow_weight\n", *rows]).encode())

    def to_parquet(self, path: str | Path) -> None:
        """Write the table of `to_csv` as a Parquet file, with pyarrow."""
        loss, weight = self._columns()
        write_parquet(path, {"index": np.arange(len(self)), "loss": loss, "flow_weight": weight})

    def to_dataset(self, dataset: Any) -> Any:
        """Return a `datasets.Dataset` of Hugging Face, of as many samples, with a further column, `flow_weight`.

        Example:
            The Trainer of transformers takes the weights through `compute_loss_func`::

                weights = fl.score(model, DataLoader(dataset, 8, collate_fn=default_data_collator), losses_of)

                def collate(samples):
                    batch = default_data_collator(samples)
                    batch["labels"] = {"labels": batch.pop("labels"), "weights": batch.pop("flow_weight")}
                    return batch

                def loss_of(outputs, labels, num_items_in_batch=None):
                    losses = F.cross_entropy(outputs.logits, labels["labels"], reduction="none")
                    return (labels["weights"] * losses).mean()

                arguments = {"train_dataset": weights.to_dataset(dataset), "data_collator": collate}
                trainer = Trainer(model, settings, compute_loss_func=loss_of, **arguments)
                trainer.loss_is_scaled_for_ga = False  # it is the mean of a micro-batch
                trainer.train()

            Its `settings` need `remove_unused_columns=False`.
        """
        if not hasattr(dataset, "add_column"):
            raise TypeError(
                f"{type(dataset).__name__} has no columns: to_dataset takes a datasets.Dataset of Hugging Face. For "
                "other data sets look weights up by position: weights.of(indices)."
            )
        if len(dataset) != len(self):
            raise ValueError(
                f"The data set has {len(dataset)} samples, but there are {len(self)} weights. Give the data set that "
                "was scored, in the same order."
            )
        if "flow_weight" in dataset.column_names:
            dataset = dataset.remove_columns("flow_weight")
        return dataset.add_column("flow_weight", self._columns()[1])

    def _columns(self) -> tuple[Any, Any]:
        """Return losses and weights as arrays."""
        return self.losses.cpu().numpy(), self.weights.cpu().numpy()

    def verify(self) -> None:
        """See the base class."""
        if self.losses.ndim != 1 or self.losses.shape != self.weights.shape:
            shapes = f"losses {tuple(self.losses.shape)} and weights {tuple(self.weights.shape)}"
            raise ValueError(f"{shapes} are not one vector each")
        if self.losses.dtype != torch.float32 or self.weights.dtype != torch.float32:
            raise ValueError(f"losses are {self.losses.dtype} and weights {self.weights.dtype}, expected float32")
        flow.check_losses(self.losses)
        if self.weighting in flow.OF_PROBE:  # what they were computed from is not kept
            if not ((self.weights >= 0) & (self.weights <= 1)).all():
                raise ValueError("its weights are not from 0 to 1")
            return
        rule = flow.weighting_rule(self.weighting)
        blocks = zip(self.losses.split(_BLOCK), self.weights.cpu().split(_BLOCK))
        if not all(torch.allclose(w, rule(l, self.temperature), rtol=1e-5, atol=1e-30) for l, w in blocks):  # noqa: E741
            formula = "exp(-loss / temperature)" if self.weighting == "flow" else f"those of {self.weighting!r}"
            raise ValueError(f"its weights are not {formula}")


@dataclass
class TokenWeights(_Stored):
    """Losses of the frozen pre-trained model and temperature, by sample index and supervised token.

    Takes 2 bytes per supervised token and 8 per sample. Weights are computed at each look-up.

    Source: Sanyal et al., ICML 2025 (arXiv 2502.02797), token-wise FLOW: `w_it = exp(-l_it / tau)`, tau the median of
    the losses of all supervised tokens.

    Attributes:
        losses: `[K]`, the supervised tokens of sample 0, then those of sample 1, and so on. They are float16, or
            float32 where half precision would move a weight by more than 1e-3.
        offsets: `[n + 1]` int64; sample i has the tokens `offsets[i]` to `offsets[i + 1]`.

    The other attributes are those of `SampleWeights`.
    """

    losses: Tensor
    offsets: Tensor
    temperature: float
    fingerprint: dict[str, str] = field(default_factory=dict)
    weighting: str = "flow"
    lookups: int = field(default=0, compare=False)

    _tensors: ClassVar[tuple[str, ...]] = ("losses", "offsets")
    file_format: ClassVar[str] = "flow_lightning.TokenWeights/2"

    @classmethod
    def from_losses(
        cls,
        losses: Tensor,
        offsets: Tensor,
        temperature: float | Literal["mixture"] | None = None,
        quantile: float = 0.5,
        fingerprint: dict[str, str] | None = None,
        weighting: str = "flow",
    ) -> "TokenWeights":
        """Compute the temperature of token losses `[K]` with offsets `[n + 1]`; see `SampleWeights.from_losses`."""
        losses, tau = _on_cpu(losses, temperature, quantile, weighting)
        return cls(_halved(losses, tau, weighting), offsets.cpu(), tau, dict(fingerprint or {}), weighting)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def weights(self) -> Tensor:
        """Weights of all supervised tokens, `[K]` float32, computed anew at each access."""
        return flow.weighting_rule(self.weighting)(self.losses, self.temperature)

    def of(self, index: Tensor) -> Tensor:
        """Return the weights of the supervised tokens of samples `index`, one sample after the other, on its device."""
        self.lookups += 1
        if self.losses.device != index.device:  # once: later batches come from the same device
            self.losses, self.offsets = self.losses.to(index.device), self.offsets.to(index.device)
        positions = token_positions(self.offsets, index)
        return flow.weighting_rule(self.weighting)(self.losses[positions], self.temperature)

    def verify(self) -> None:
        """See the base class."""
        if self.losses.ndim != 1 or self.offsets.ndim != 1 or self.offsets.numel() < 2:
            shapes = f"losses {tuple(self.losses.shape)} and offsets {tuple(self.offsets.shape)}"
            raise ValueError(f"{shapes} are not vectors")
        if self.losses.dtype not in (torch.float16, torch.float32) or self.offsets.dtype != torch.int64:
            raise ValueError(f"losses are {self.losses.dtype} and offsets {self.offsets.dtype}")
        ends = self.offsets[[0, -1]].tolist()
        if ends != [0, self.losses.numel()] or (self.offsets.diff() < 0).any():
            raise ValueError(f"offsets from {ends[0]} to {ends[1]} do not divide {self.losses.numel()} losses")
        flow.check_losses(self.losses.float())
        flow.weighting_rule(self.weighting)(self.losses[:1], self.temperature)


def token_positions(offsets: Tensor, index: Tensor) -> Tensor:
    """Return the positions `[K]` of the tokens of samples `index` `[B]`, one sample after the other.

    Sample i has the positions `offsets[i]` to `offsets[i + 1]`.

    >>> token_positions(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 1, 0]))
    tensor([2, 3, 4, 0, 1])
    """
    starts, counts = offsets[index], offsets[index + 1] - offsets[index]
    ends = counts.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=index.device)
    return within + (starts - (ends - counts)).repeat_interleave(counts)


def _on_cpu(
    losses: Tensor, temperature: float | Literal["mixture"] | None, quantile: float, weighting: str
) -> tuple[Tensor, float]:
    flow.check_losses(losses)
    losses = losses.detach().float().cpu()
    return losses, flow.parameter_of(losses, weighting, temperature, quantile)


def _halved(losses: Tensor, tau: float, weighting: str) -> Tensor:
    rule, half = flow.weighting_rule(weighting), losses.half()
    if not torch.isfinite(half).all():
        return losses
    moved = (rule(half, tau) - rule(losses, tau)).abs().max()
    return half if float(moved) <= _TOLERANCE else losses
