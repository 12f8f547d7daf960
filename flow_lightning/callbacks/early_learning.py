"""A term of the loss that holds predictions to what the model predicted early, before it learned wrong labels by heart.

In: the logits of each step, the indices of its samples. Out: a term of the loss. Next: `distillation.py`.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from flow_lightning.callbacks.around_step import AroundStep
from flow_lightning.callbacks.online_weights import SeenLogits
from flow_lightning.contract import module_contract
from flow_lightning.data.indexing import batch_index
from flow_lightning.distributed import gather
from flow_lightning.method.losses import early_learning


class EarlyLearningCallback(AroundStep):
    """Add `strength` times the mean of `log(1 - <p, t>)` to the loss: early-learning regularisation, for wrong labels.

    p is the prediction for a sample. Its target t is a running mean of its predictions, 0 at first: each visit makes it
    `momentum * t + (1 - momentum) * p` (Liu et al., ELR, arXiv 2007.00151). Strength and momentum are by default those
    that they take for CIFAR-10. Sample weights do not apply.

    It is for any module whose step calls `torch.nn.functional.cross_entropy` on logits `[B, C]`; of several such calls
    the last one counts. Samples are known by the `index` of their batch, as of `IndexedDataset`, or by
    FlowWeightingCallback. Targets take `4 n C` bytes of the CPU's memory on each process, n the number of training
    samples. All processes exchange their predictions in each step, so N of them have the targets of one process with an
    N times larger batch. A checkpoint carries the targets.

    Args:
        strength: The factor of the term.
        momentum: Of the targets, from 0 to below 1.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: In the fit, if the training loader's data set has no length.
        KeyError: In the fit, if it is not known which samples are in a batch.
        RuntimeError: In the fit, if a step has no such logits of the samples of its batch. Also if a fit resumes from a
            checkpoint that was written without this callback.
    """

    def __init__(self, *, strength: float = 3.0, momentum: float = 0.7) -> None:
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength is {strength}; expected a number above 0.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected a number from 0 to below 1, such as 0.7.")
        self.strength, self.momentum = strength, momentum
        self._targets: Tensor | None = None  # [n, C], from the first step on
        self._logits: list[Tensor] = []  # of the step that runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._targets = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a resumed fit whose early predictions are not known."""
        self.check_checkpoint(trainer, has_state=self._targets is not None)

    def around(self, trainer: Trainer, module: LightningModule, batch: Any) -> AbstractContextManager[Any]:
        """Note the logits of the step."""
        self._logits = []
        return SeenLogits(lambda logits: logits, self._logits)

    def term(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
        """Update the targets of the samples of a step that has just run, and compute the term."""
        index = batch_index(batch, module_contract(module).batch_samples).cpu()
        seen, self._logits = self._logits, []
        fitting = [each for each in seen if each.ndim == 2 and len(each) == len(index) and each.requires_grad]
        if not fitting:
            raise RuntimeError(
                f"{type(module).__name__}.training_step has no cross_entropy of logits [{len(index)}, C], one row for "
                "each sample. EarlyLearningCallback needs it, without reduction='sampling'."
            )
        now = fitting[-1].float().softmax(1)
        targets = self._updated(trainer, index, now.detach().cpu())
        return self.strength * early_learning(now, targets.to(now.device)).mean()

    def _updated(self, trainer: Trainer, index: Tensor, now: Tensor) -> Tensor:
        """Take the predictions `[B, C]` of all processes into the targets; return those of this one, `[B, C]`."""
        if self._targets is None:
            self._targets = torch.zeros(_number_of_samples(trainer), now.shape[1])
        everywhere, predictions = gather(trainer, [(index, now)])
        targets = self._targets
        targets[everywhere] = self.momentum * targets[everywhere] + (1 - self.momentum) * predictions
        return targets[index]

    def state_dict(self) -> dict[str, Any]:
        """Return the targets."""
        return {"targets": self._targets}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the targets of a checkpoint."""
        self._targets = state_dict["targets"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory."""
        super().teardown(trainer, pl_module, stage)
        self._targets, self._logits = None, []


def _number_of_samples(trainer: Trainer) -> int:
    try:
        return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError) as error:
        raise TypeError(
            "EarlyLearningCallback keeps a target for each sample, so it needs one training loader with a data set of "
            "known length: a DataLoader of a map-style data set."
        ) from error
