"""The whole contract between a model and FLOW: one method, `sample_losses`."""

from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from flow_lightning.callbacks.step_denominator import StepDenominator, spans_batches
from flow_lightning.callbacks.stop_on_nan import FiniteLosses
from flow_lightning.data.indexing import batch_index, find_index, select
from flow_lightning.method.objective import Reduction, denominator, draw, weighted_loss
from flow_lightning.method.weights import SampleWeights, TokenWeights


class WeightedLossModule(LightningModule):
    """A LightningModule that trains on the weighted loss of its samples.

    Write `sample_losses` (and `configure_optimizers`); `FlowWeightingCallback` calls it on the frozen model to compute
    the weights, and `training_step` calls it to train. Without the callback all weights are 1: plain training.

    Args:
        reduction: The denominator of the objective: `batch`, `sum(w l) / B` as in the paper; `weights`,
            `sum(w l) / sum(w)`, which keeps the size of the step; or `sampling`, which trains on samples drawn with
            probability `w`: the expected step of `batch`, with more noise, at the cost of `sum(w)` samples.

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

    #: Attributes on which the losses do not depend: weights found in the cache stay valid when these change.
    not_in_losses: ClassVar[frozenset[str]] = frozenset(
        {"reduction", "sample_weights", "step_denominator", "finite_losses", "flow_reference"}
        | {"learning_rate", "optimizer", "schedule", "warmup"}
    )
    #: Set by FlowWeightingCallback; a plain attribute, so that neither checkpoints nor weight averaging see it.
    sample_weights: SampleWeights | TokenWeights | None = None
    #: Set by FlowWeightingCallback where batches carry no index.
    batch_samples: Tensor | None = None
    _seed: int | None = None
    #: Fingerprint of the model that the weights of the loaded checkpoint came from.
    flow_reference: str | None = None

    def __init__(self, reduction: Reduction = "batch") -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.step_denominator = StepDenominator()
        self.finite_losses = FiniteLosses()

    def sample_losses(self, batch: Any) -> Tensor:
        """Compute the loss of each sample of a batch, without any side effect.

        Args:
            batch: A batch of the training data, with the samples' `index`.

        Returns:
            One loss per sample, `[B]`, not negative.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample_losses(batch) -> Tensor of shape [B].")

    def training_losses(self, batch: Any) -> Tensor:
        """Compute the terms of the objective, `[K]`: by default the sample losses, one for each sample."""
        return self.sample_losses(batch)

    def training_weights(self, batch: Any) -> Tensor | None:
        """Look up the weight of each term of the objective, `[K]`; None without FlowWeightingCallback."""
        return None if self.sample_weights is None else self.sample_weights.lookup(self.sample_index(batch))

    def sample_index(self, batch: Any) -> Tensor:
        """Return the indices of the samples in a training batch, `[B]`, on the module's device.

        They are the batch's own `index`, or what FlowWeightingCallback knows from the loader.

        Raises:
            KeyError: If neither is there; the message names the fix.
        """
        if find_index(batch) is None and self.batch_samples is not None:
            return self.batch_samples.to(self.device)
        return batch_index(batch)

    def weighted_loss(self, batch: Any, losses: Tensor) -> Tensor:
        """Reduce the losses of a batch, `[K]`, with their weights, to the scalar to minimise.

        Under gradient accumulation or several processes its gradient is set right before the optimizer step, so that
        the denominator is that of the whole step. A module with an `on_before_optimizer_step` of its own must call
        `super().on_before_optimizer_step(optimizer)`.
        """
        self._note(batch, losses)
        weights = self.training_weights(batch)
        loss = weighted_loss(losses, weights, self.reduction)
        return self._over_the_step(loss, denominator(losses, weights, self.reduction))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch and log it."""
        if self.reduction == "sampling" and self.sample_weights is not None:
            loss, size = self._drawn_loss(batch), batch_index(batch).numel()
        else:
            losses = self.training_losses(batch)
            loss, size = self.weighted_loss(batch, losses), losses.numel()
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def on_train_start(self) -> None:
        """Remember the run's seed, that of rank 0, and let a resumed run's loader know where it was."""
        self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        self.step_denominator.reset()
        fit_loop = self.trainer.fit_loop
        # Lightning does this when it asks for the loader, but forgets it where configure_optimizers has asked before.
        fit_loop._load_combined_loader_states()
        epoch: Any = fit_loop.epoch_progress
        if fit_loop.restarted_mid_epoch and epoch.current.processed == epoch.current.started:
            # A checkpoint of an epoch's last batch: Lightning counts that epoch as finished, but does not count the
            # next as begun, so that a second resumed run, in the middle of that one, would start it anew.
            fit_loop.reset_restart_stage()
        if fit_loop.restarted_on_epoch_end:
            # Lightning would run an epoch without batches, and count it.
            epoch.current.completed, epoch.total.completed = epoch.current.processed, epoch.total.processed
            fit_loop.reset_restart_stage()
            self._end_of_restart()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of seed, epoch, batch and rank: a resumed run draws what an unbroken one does."""
        if self._seed is not None:
            torch.manual_seed(hash((self._seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)
        self._end_of_restart()  # else schedulers that watch a metric would miss that of this epoch

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Give the gradient the denominator of the whole step."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self.step_denominator.normalise((p.grad for p in parameters if p.grad is not None), self.trainer)

    def _end_of_restart(self) -> None:
        fit_loop = self.trainer.fit_loop
        fit_loop._restarting = fit_loop.epoch_loop.restarting = False  # the loop's own setter may say True instead

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to put a model that has diverged in the place of a sound one."""
        self.finite_losses.check_everywhere(self.trainer, self.parameters())

    def on_train_epoch_end(self) -> None:
        """Check the last losses of the epoch."""
        self.finite_losses.check_everywhere(self.trainer)

    def _note(self, batch: Any, losses: Tensor) -> None:
        index = find_index(batch)  # plain training needs none
        if index is not None and self.training and torch.is_grad_enabled() and self.is_attached:
            self.finite_losses.note(self.trainer.fit_loop.total_batch_idx, index, losses)

    def _over_the_step(self, loss: Tensor, size: Tensor | float) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and self._trainer_spans_batches()):
            return loss
        return self.step_denominator.loss(loss, size, self.trainer)

    def _trainer_spans_batches(self) -> bool:
        return self.is_attached and self.automatic_optimization and spans_batches(self.trainer)

    @property
    def is_attached(self) -> bool:
        """Whether a Trainer runs this module."""
        try:
            return self.trainer is not None
        except RuntimeError:  # how LightningModule says that there is none
            return False

    def _drawn_loss(self, batch: Any) -> Tensor:
        """Estimate the weighted loss from the samples of the batch that are drawn with probability `w`."""
        assert self.sample_weights is not None
        index = batch_index(batch)
        weights = self.sample_weights.lookup(index)
        seed = torch.initial_seed() if self._seed is None else self._seed
        drawn = draw(weights, index, hash((seed, self.current_epoch)))
        if drawn.numel() == 0:  # every rank must take part in the backward pass
            drawn = torch.zeros(1, dtype=torch.long, device=weights.device)
            loss = self.sample_losses(select(batch, drawn)).sum() * 0
        else:
            taken = select(batch, drawn)
            losses = self.sample_losses(taken)
            self._note(taken, losses)
            loss = losses.sum() / weights.numel()
        return self._over_the_step(loss, weights.numel())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which pre-trained model the run of this checkpoint started from."""
        self.flow_reference = checkpoint.get("flow_reference")
