"""The `training_step` of an unchanged module, with the losses of its samples weighted.

In: a module of any class, the weights of a batch. Out: its own step, weighted. Next: `step_proof.py`.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from flow_lightning.contract import module_contract
from flow_lightning.method.interception import Interception, describe
from flow_lightning.method.objective import weighted_loss
from flow_lightning.modules.step_proof import StepProof
from flow_lightning.scoring.own_step import HOW_TO_GIVE_LOSSES

SampleLossFunction = Callable[[Any, Any], Tensor]


class WeightedStep:
    """Stands for the `training_step` of a module from `install` to `remove`.

    Losses of `torch.nn.functional`, and `sample_losses(batch)` if the module has that method and calls it, are weighted
    where they are computed. With a function for the losses, the step is `mean(w l)` of what it returns. A step that
    looks its weights up, as that of `WeightedLossModule` does, is left as it is.

    Args:
        trainer: Runs the fit.
        module: Its module.
        weights_of: Gives the weights of a batch, of samples `[B]` or tokens `[K]`; None if it has no samples to weigh.
        loss: The one loss that is weighted, by name; None for all.
        function: Gives the losses `[B]` of module and batch, in place of the module's own step.
        alone: Losses that have no batch dimension, as scoring found them, see `Interception`.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights_of: Callable[[Any], Tensor | None],
        loss: str | None = None,
        function: SampleLossFunction | None = None,
        alone: set[tuple[Any, ...]] | None = None,
    ) -> None:
        self.module, self.weights_of, self.proof = module, weights_of, StepProof(trainer, module)
        self.loss, self.function, self.alone = loss, function, set() if alone is None else alone
        self._own: dict[str, Any] = {}
        self._seen: Interception | None = None  # of the step that runs

    def install(self) -> None:
        """Take the place of the module's own step."""
        own = vars(self.module)
        self._own = {name: own[name] for name in ("training_step", "sample_losses") if name in own}
        step: Any = self.module.training_step

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(step, *args, **kwargs)

        if (losses := module_contract(self.module).sample_losses) is not None:
            own["sample_losses"] = lambda batch: self._weighed(losses, batch)
        vars(training_step)["own"] = step  # what is only to be measured is neither weighed nor proven
        own["training_step"] = training_step

    def remove(self) -> None:
        """Give the module its own step back."""
        for name in ("training_step", "sample_losses"):
            vars(self.module).pop(name, None)
        vars(self.module).update(self._own)

    def _step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        weights = None if self.proof.weighs_itself else self.weights_of(batch)
        if weights is None:
            return step(batch, *args, **kwargs)
        if self.function is not None:
            return weighted_loss(self.function(self.module, batch), weights)
        run = partial(self._run, partial(step, batch, *args, **kwargs))
        if not self.proof.losses:
            self.proof.give(run, torch.ones_like(weights))
        output, seen = run(None if self.proof.weighs_itself else weights)
        if self.proof.losses and seen is not None:
            self._check_batch(seen, has_loss=output is not None)
        return output

    def _check_batch(self, seen: Interception, has_loss: bool) -> None:
        """Refuse a batch whose losses are not weighed, though they were in the proof."""
        if self.proof.losses & (set(seen.left_alone) - set(seen.rows)) or (has_loss and not seen.weighed):
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step cannot be weighted in this batch, as it was before: "
                f"{describe(seen)} {HOW_TO_GIVE_LOSSES}"
            )

    def _run(
        self, step: Callable[[], Any], weights: Tensor | None, **settings: bool
    ) -> tuple[Any, Interception | None]:
        """Run a step with weights; with None, as the module itself does. The settings are those of `Interception`."""
        if weights is None:
            return step(), None
        with Interception(len(weights), weights, self.loss, alone=self.alone, **settings) as self._seen:
            try:
                return step(), self._seen
            finally:
                self._seen = None

    def _weighed(self, losses: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Compute the losses of `sample_losses`, weighted where a step asks for them."""
        if (seen := self._seen) is None or seen.is_paused:
            return losses(batch)
        return seen.weigh(partial(losses, batch))
