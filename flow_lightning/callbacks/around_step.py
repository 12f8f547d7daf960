"""One place for all that surrounds a `training_step`: what watches it, and what is added to its loss.

In: the step of any module, weighted or not. Out: the same step in a context, with further terms in its loss.
Next: `online_weights.py`, `distillation.py`.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from flow_lightning.run import RunCallback


class AroundStep(RunCallback):
    """A callback that surrounds each training step. Several of them do so in the order of the list.

    They surround the step that FlowWeightingCallback weighs, so their terms have no weights. Terms are means over the
    batch: in a module of this library they share the denominator of the whole optimizer step.
    """

    _step: Any = None
    _own: Any = None

    def around(self, trainer: Trainer, module: LightningModule, batch: Any) -> AbstractContextManager[Any]:
        """Return the context in which the step runs."""
        return nullcontext()

    def term(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
        """Compute what is added to the loss of a step that has just run, a scalar; None for nothing."""
        return None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Surround the step before the first batch: the first of these callbacks does it for all.

        FlowWeightingCallback has done so at the start of the fit. Lightning has no `on_train_epoch_start` in an epoch
        that a resumed fit begins in its middle.
        """
        others = [each for each in trainer.callbacks if isinstance(each, AroundStep)]  # type: ignore[attr-defined]
        if self._step is not None or others[0] is not self:
            return
        if not pl_module.automatic_optimization and any(type(each).term is not AroundStep.term for each in others):
            raise TypeError(
                f"{type(pl_module).__name__} optimises by hand, so nothing can be added to its loss. Leave "
                f"{type(self).__name__} out, or set automatic_optimization = True."
            )
        step: Any = pl_module.training_step

        @wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for each in others:
                    stack.enter_context(each.around(trainer, pl_module, batch))
                output = step(batch, *args, **kwargs)
            return _with_terms(output, (each.term(trainer, pl_module, batch) for each in others))

        self._own, self._step = vars(pl_module).get("training_step"), training_step
        vars(pl_module)["training_step"] = training_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the step as it was."""
        if self._step is not None and vars(pl_module).get("training_step") is self._step:
            vars(pl_module).pop("training_step")
            vars(pl_module).update({} if self._own is None else {"training_step": self._own})
        self._step = self._own = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the step as it was after a failure."""
        super().on_exception(trainer, pl_module, exception)
        self.on_train_end(trainer, pl_module)


def _with_terms(output: Any, terms: Iterable[Tensor | None]) -> Any:
    """Add terms to the loss in what a step returned; a step that gave no loss stays without one."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        return output
    for term in terms:
        loss = loss if term is None else loss + term
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss
