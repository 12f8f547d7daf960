"""Room 3 for language models: one weight per supervised token, kept ragged and in half precision.

Source: Sanyal et al., ICML 2025 (arXiv 2502.02797), token-wise FLOW: `w_it = exp(-l_it / tau)`, tau the median of the
losses of all supervised tokens.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flow_lightning.tensor_files import checksum, load_tensors, save_tensors
from flow_lightning.weighting import check_losses, summarise, temperature, weighting_rule

_FORMAT = "flow_lightning.TokenWeights/2"
#: Half precision is used where it moves no weight by more than this.
_TOLERANCE = 1e-3


@dataclass
class TokenWeights:
    """Losses of the frozen pre-trained model and temperature, by sample index and supervised token.

    Takes 2 bytes per supervised token and 8 per sample; weights are computed at each look-up.

    Attributes:
        losses: `[K]`, the supervised tokens of sample 0, then those of sample 1, and so on; float16, or float32 where
            half precision would move a weight by more than 1e-3.
        offsets: `[n + 1]` int64; sample i has the tokens `offsets[i]` to `offsets[i + 1]`.
        temperature: tau.
        fingerprint: What the losses were computed from, for example `{"dataset": "...", "reference": "..."}`.
        weighting: Name of the rule from losses to weights, see `flow_lightning.weighting.WEIGHTINGS`.
        lookups: How often `lookup` was called.
    """

    losses: Tensor
    offsets: Tensor
    temperature: float
    fingerprint: dict[str, str] = field(default_factory=dict)
    weighting: str = "flow"
    lookups: int = field(default=0, compare=False)

    @classmethod
    def from_losses(
        cls,
        losses: Tensor,
        offsets: Tensor,
        temperature: float | None = None,
        quantile: float = 0.5,
        fingerprint: dict[str, str] | None = None,
        weighting: str = "flow",
    ) -> "TokenWeights":
        """Compute the temperature (unless one is given) from the token losses, `[K]` and `[n + 1]`."""
        check_losses(losses)
        losses = losses.detach().float().cpu()
        tau = _temperature(losses, quantile) if temperature is None else float(temperature)
        stored = _halved(losses, tau, weighting)
        return cls(stored, offsets.cpu(), tau, dict(fingerprint or {}), weighting)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def weights(self) -> Tensor:
        """Weights of all supervised tokens, `[K]` float32, computed anew at each access."""
        return weighting_rule(self.weighting)(self.losses, self.temperature)

    def lookup(self, index: Tensor) -> Tensor:
        """Return the weights of the supervised tokens of samples `index`, one sample after the other, on its device."""
        self.lookups += 1
        if self.losses.device != index.device:  # once: later batches come from the same device
            self.losses, self.offsets = self.losses.to(index.device), self.offsets.to(index.device)
        return weighting_rule(self.weighting)(self.losses[token_positions(self.offsets, index)], self.temperature)

    def summary(self) -> dict[str, float]:
        """Return temperature, mean weight, effective sample size (in tokens) and quantiles, as in `metrics.json`."""
        return summarise(self.weights, self.temperature)

    def digest(self) -> str:
        """Hash losses, temperature and all else, so that a checkpoint can tell whether it found its file."""
        return checksum(*self._content())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically: a reader sees the old file or the new one, never a part."""
        save_tensors(path, _FORMAT, *self._content())

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        metadata = {
            "temperature": repr(self.temperature),
            "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
            "weighting": self.weighting,
        }
        return {"losses": self.losses.cpu(), "offsets": self.offsets.cpu()}, metadata

    @classmethod
    def load(cls, path: str | Path) -> "TokenWeights":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or is not a token weights file of this library.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"No weights file at {path}. A fit with FlowWeightingCallback(per='token') writes one."
            )
        try:
            tensors, metadata = load_tensors(path, _FORMAT)
            loaded = cls(
                tensors["losses"],
                tensors["offsets"],
                float(metadata["temperature"]),
                dict(json.loads(metadata["fingerprint"])),
                metadata["weighting"],
            )
            loaded.verify()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a usable token weights file: {error}. Delete it and score again."
            ) from error
        return loaded

    def verify(self) -> None:
        """Check that losses, offsets and temperature fit together.

        Raises:
            ValueError: If shapes or types are wrong, or a loss is not usable.
        """
        if self.losses.ndim != 1 or self.offsets.ndim != 1 or self.offsets.numel() < 2:
            raise ValueError(
                f"losses {tuple(self.losses.shape)} and offsets {tuple(self.offsets.shape)} are not vectors"
            )
        if self.losses.dtype not in (torch.float16, torch.float32) or self.offsets.dtype != torch.int64:
            raise ValueError(f"losses are {self.losses.dtype} and offsets {self.offsets.dtype}")
        ends = self.offsets[[0, -1]].tolist()
        if ends != [0, self.losses.numel()] or (self.offsets.diff() < 0).any():
            raise ValueError(f"offsets from {ends[0]} to {ends[1]} do not divide {self.losses.numel()} losses")
        check_losses(self.losses.float())
        weighting_rule(self.weighting)(self.losses[:1], self.temperature)


def token_positions(offsets: Tensor, index: Tensor) -> Tensor:
    """Return where the tokens of some samples stand, one sample after the other.

    Args:
        offsets: `[n + 1]`; sample i has the positions `offsets[i]` to `offsets[i + 1]`.
        index: Samples, `[B]`.

    Returns:
        Positions, `[K]`, K the number of tokens of these samples.

    Example:
        >>> token_positions(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 1, 0]))
        tensor([2, 3, 4, 0, 1])
    """
    starts, counts = offsets[index], offsets[index + 1] - offsets[index]
    ends = counts.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=index.device)
    return within + (starts - (ends - counts)).repeat_interleave(counts)


def _halved(losses: Tensor, tau: float, weighting: str) -> Tensor:
    rule, half = weighting_rule(weighting), losses.half()
    if not torch.isfinite(half).all():
        return losses
    moved = (rule(half, tau) - rule(losses, tau)).abs().max()
    return half if float(moved) <= _TOLERANCE else losses


_temperature = temperature  # `temperature` is also the name of an argument above
