"""The contract between a model and FLOW: one method, `sample_losses`; all else has a default.

In: a batch. Out: the weighted loss. Next: `method/objective.py`, and the callbacks that `configure_callbacks` names.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from lightning import Callback, LightningModule
from torch import Tensor

from flow_lightning.callbacks.step_denominator import StepDenominator
from flow_lightning.callbacks.stop_on_nan import StopOnNaN
from flow_lightning.contract import BatchLosses
from flow_lightning.data.indexing import batch_index, find_index, select
from flow_lightning.method.objective import Reduction, denominator, draw, weighted_loss
from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.resume import LoopRepairs


class WeightedLossModule(LightningModule):
    """A LightningModule that trains on the weighted loss of its samples.

    Write `sample_losses`, and `configure_optimizers`. `FlowWeightingCallback` calls the former on the frozen model to
    compute the weights. `training_step` calls it to train. Without the callback all weights are 1: plain training. What
    callbacks ask of a module beside that is in `flow_lightning.contract.ModuleContract`.

    All hooks of LightningModule are free for your own code, without `super()`, except `configure_callbacks`.

    Args:
        reduction: The denominator of the objective. `batch` is `sum(w l) / B`, as in the paper. `weights` is
            `sum(w l) / sum(w)`, which keeps the size of the step. `sampling` trains on samples drawn with probability
            `w`: the expected step of `batch`, with more noise, at the cost of `sum(w)` samples.

    Example:
        >>> import torch
        >>> class LinearRegression(WeightedLossModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(2, 1)
        ...     def sample_losses(self, batch):
        ...         return (self.linear(batch["x"]).squeeze(1) - batch["y"]).square()
        >>> batch = {"x": torch.ones(3, 2), "y": torch.zeros(3), "index": torch.arange(3)}
        >>> LinearRegression().sample_losses(batch).shape
        torch.Size([3])
    """

    # Plain attributes, so that neither checkpoints nor weight averaging see them; see ModuleContract.
    sample_weights: SampleWeights | TokenWeights | None = None
    batch_samples: Tensor | None = None
    flow_reference: str | None = None
    batch_losses: BatchLosses | None = None
    run_seed: int | None = None
    online_weights: Callable[[Tensor], Tensor] | None = None
    weighs_online = True

    def __init__(self, reduction: Reduction = "batch") -> None:
        super().__init__()
        self.reduction: Reduction = reduction

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note the reference of a checkpoint before the class's own hook: `load_from_checkpoint` has no callbacks."""
        super().__init_subclass__(**kwargs)
        own: Any = cls.on_load_checkpoint

        @wraps(own)
        def on_load_checkpoint(self: WeightedLossModule, checkpoint: dict[str, Any]) -> None:
            self.flow_reference = checkpoint.get("flow_reference")
            own(self, checkpoint)

        cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[assignment, method-assign]

    def configure_callbacks(self) -> Sequence[Callback]:
        """Bring along what every fit needs; in a method of your own, add to `super().configure_callbacks()`.

        Without them the fit does not stop at a NaN loss, each micro-batch has its own denominator, and a resumed fit
        has the faults of Lightning's loops that `LoopRepairs` names.
        """
        return [StopOnNaN(), StepDenominator(), LoopRepairs()]

    def sample_losses(self, batch: Any) -> Tensor:
        """Compute the loss of each sample of a training batch, `[B]`, not negative, without any side effect."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_losses(batch) -> Tensor of shape [B].")

    def training_losses(self, batch: Any) -> Tensor:
        """Compute the terms of the objective, `[K]`: by default the sample losses, one for each sample.

        With reduction='sampling' there is one term for each sample, too.
        """
        return self.sample_losses(batch)

    def training_weights(self, batch: Any) -> Tensor | None:
        """Look up the weight of each term of the objective, `[K]`; None without FlowWeightingCallback."""
        return None if self.sample_weights is None else self.sample_weights.of(self.sample_index(batch))

    def sample_index(self, batch: Any) -> Tensor:
        """Return the indices of the samples in a training batch, `[B]`: its own, or those that the loader drew.

        Raises:
            KeyError: If neither is known, as without FlowWeightingCallback; the message names the fix.
        """
        return batch_index(batch, self.batch_samples).to(self.device)

    def weighted_loss(self, batch: Any, losses: Tensor) -> Tensor:
        """Reduce the losses of a batch, `[K]`, with their weights, to the scalar to minimise.

        Under gradient accumulation or several processes `StepDenominator` gives the gradient the denominator of the
        whole step.
        """
        weights = self._with_online_weights(self.training_weights(batch), losses)
        index = self.batch_samples if (own := find_index(batch)) is None else own
        self._note(index, losses, denominator(losses, weights, self.reduction))
        return weighted_loss(losses, weights, self.reduction)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch and log it."""
        if self.reduction == "sampling" and self.sample_weights is not None:
            loss, size = self._drawn_loss(batch), self.sample_index(batch).numel()
        else:
            losses = self.training_losses(batch)
            loss, size = self.weighted_loss(batch, losses), losses.numel()
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def _drawn_loss(self, batch: Any) -> Tensor:
        """Estimate the weighted loss from the samples of the batch that are drawn with probability `w`."""
        index = self.sample_index(batch)
        weights = self.sample_weights.of(index)  # type: ignore[union-attr]
        seed = torch.initial_seed() if self.run_seed is None else self.run_seed
        drawn = draw(weights, index, hash((seed, self.current_epoch)))
        share = float(drawn.numel() > 0)
        if drawn.numel() == 0:  # every rank must take part in the backward pass
            drawn = torch.zeros(1, dtype=torch.long, device=weights.device)
        batch = select(batch, drawn, index.numel())
        losses = self.training_losses(batch)
        self._note(index[drawn], losses, weights.numel())
        online = self._with_online_weights(None, losses)
        losses = losses if online is None else losses * online
        return losses.sum() * share / weights.numel()

    def _with_online_weights(self, weights: Tensor | None, losses: Tensor) -> Tensor | None:
        """Multiply weights by those of OnlineWeightsCallback, if there is one."""
        if self.online_weights is None or not self.training:
            return weights
        online = self.online_weights(losses.detach())
        return online if weights is None else weights * online

    def _note(self, index: Tensor | None, losses: Tensor, size: Tensor | float) -> None:
        if self.training and torch.is_grad_enabled():
            self.batch_losses = BatchLosses(index, losses.detach(), size)
