"""The whole contract between a model and FLOW: one method, `sample_losses`."""

from typing import Any

from lightning import LightningModule
from torch import Tensor

from flow_lightning.indexing import batch_index
from flow_lightning.objective import Reduction, weighted_loss
from flow_lightning.weighting import SampleWeights


class WeightedLossModule(LightningModule):
    """A LightningModule that trains on the weighted loss of its samples.

    Write `sample_losses` (and `configure_optimizers`); `FlowWeightingCallback` calls it on the frozen model to compute
    the weights, and `training_step` calls it to train. Without the callback all weights are 1: plain training.

    Args:
        reduction: The denominator of the objective: `batch`, `sum(w l) / B` as in the paper, or `weights`,
            `sum(w l) / sum(w)`, which keeps the size of the step.

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

    #: Set by FlowWeightingCallback; a plain attribute, so that neither checkpoints nor weight averaging see it.
    sample_weights: SampleWeights | None = None
    #: Fingerprint of the model that the weights of the loaded checkpoint came from.
    flow_reference: str | None = None

    def __init__(self, reduction: Reduction = "batch") -> None:
        super().__init__()
        self.reduction: Reduction = reduction

    def sample_losses(self, batch: Any) -> Tensor:
        """Compute the loss of each sample of a batch, without any side effect.

        Args:
            batch: A batch of the training data, with the samples' `index`.

        Returns:
            One loss per sample, `[B]`, not negative.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample_losses(batch) -> Tensor of shape [B].")

    def weighted_loss(self, batch: Any, losses: Tensor) -> Tensor:
        """Reduce the sample losses of a batch, `[B]`, with the samples' weights, to the scalar to minimise."""
        weights = None if self.sample_weights is None else self.sample_weights.lookup(batch_index(batch))
        return weighted_loss(losses, weights, self.reduction)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch and log it."""
        losses = self.sample_losses(batch)
        loss = self.weighted_loss(batch, losses)
        self.log("train/loss", loss, prog_bar=True, batch_size=losses.numel())
        return loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which pre-trained model the run of this checkpoint started from."""
        self.flow_reference = checkpoint.get("flow_reference")
