"""Weights that follow the model in training, for any module; they multiply those of FlowWeightingCallback.

In: the losses of each step. Out: their weights, or another learning rate. Next: `method/online.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flow_lightning.callbacks.around_step import AroundStep
from flow_lightning.contract import module_contract
from flow_lightning.method.interception import LOSSES, Interception
from flow_lightning.method.online import RULES, entropy_gate, rate_factor
from flow_lightning.run import RunCallback

_CHUNK = 256


class OnlineWeightsCallback(AroundStep):
    """Weigh each loss of a training step by a rule of what the model itself thinks of it now.

    A module of this library is weighted term by term: each sample, or each supervised token. In any other module the
    elements of its loss are. With FlowWeightingCallback both weights are multiplied. Rules that compare losses
    (`adaptive`, `smallest`) compare those of one micro-batch in one process.

    Args:
        rule: `probability` (DFT, generalised cross-entropy), `adaptive` (TALR), `smallest` (small-loss selection), all
            in `flow_lightning.method.online.RULES`; or `entropy` (EAFT), which looks at the logits.
        value: The rule's one number: its power, floor, share, or the gate's power. By default the rule's own.
        loss: In other modules, the loss of `torch.nn.functional` that is weighted, by name.

    Raises:
        ValueError: If a rule or a loss has no such name, or the value is out of range.
        RuntimeError: In the fit, if a step has no such loss.
    """

    def __init__(self, *, rule: str = "probability", value: float | None = None, loss: str = "cross_entropy") -> None:
        if rule not in (*RULES, "entropy"):
            raise ValueError(f"rule is {rule!r}; expected one of {', '.join([*RULES, 'entropy'])}.")
        if loss not in {function.__name__ for function in LOSSES}:
            raise ValueError(f"loss is {loss!r}; expected the name of a loss of torch.nn.functional.")
        if value is not None and not (0 < value <= 1 or (value > 1 and rule in ("probability", "entropy"))):
            raise ValueError(f"value is {value}; expected a number above 0, and a share or a floor of at most 1.")
        function: Any = entropy_gate if rule == "entropy" else RULES[rule]
        name = list(signature(function).parameters)[1]
        self.rule, self.loss = rule, loss
        self.function: Any = partial(function, **({} if value is None else {name: value}))
        self._gates: list[Tensor] = []
        self._uses = 0  # of the rule, by a module that weighs its losses itself

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the rule to a module that weighs its losses itself."""
        self._uses = 0
        if module_contract(pl_module).weighs_online:
            vars(pl_module)["online_weights"] = self._of_losses

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse, with a RuntimeError, to train on without these weights."""
        if outputs and self._uses == 0 and module_contract(pl_module).weighs_online:
            raise RuntimeError(
                f"{type(pl_module).__name__}.training_step does not call weighted_loss, so OnlineWeightsCallback has "
                "no effect. Return `self.weighted_loss(batch, self.sample_losses(batch))`."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the rule back."""
        super().on_train_end(trainer, pl_module)
        vars(pl_module).pop("online_weights", None)

    def around(self, trainer: Trainer, module: LightningModule, batch: Any) -> AbstractContextManager[Any]:
        """Weigh the losses of a module that does not do it itself, or watch the logits of one that does."""
        self._gates = []
        if not module_contract(module).weighs_online:
            return self._weighing(module)
        return SeenLogits(self.function, self._gates) if self.rule == "entropy" else nullcontext()

    def _of_losses(self, losses: Tensor) -> Tensor:
        """Return the factors of the losses of a step, `[K]`."""
        self._uses += 1
        if self.rule != "entropy":
            return self.function(losses)  # type: ignore[no-any-return]
        gates = torch.cat(self._gates) if self._gates else losses[:0]
        self._gates.clear()
        if gates.shape != losses.shape:
            raise RuntimeError(
                f"The step has {losses.numel()} losses, but the logits of {gates.numel()} were seen in its "
                "cross-entropy. The rule 'entropy' needs torch.nn.functional.cross_entropy, once for each loss."
            )
        return gates

    @contextmanager
    def _weighing(self, module: LightningModule) -> Iterator[None]:
        with _OnlineInterception(self.loss, self.function, self.rule == "entropy") as seen:
            yield
        if not seen.weighed:
            raise RuntimeError(
                f"{type(module).__name__}.training_step has no {self.loss} to weigh. Name its loss: "
                "OnlineWeightsCallback(loss=...)."
            )


class _OnlineInterception(Interception):
    """Multiplies each element that counts by the rule's factor."""

    def __init__(self, name: str, function: Any, is_gate: bool) -> None:
        super().__init__(size=1, name=name)
        self.function, self.is_gate = function, is_gate

    def _weigh(self, name: str, losses: Tensor, counts: Tensor, first: Any, target: Any) -> Tensor:
        self.weighed += 1
        factors, own = torch.ones_like(losses), counts > 0
        if own.any():
            values = first.movedim(1, -1)[own].detach() if self.is_gate else losses[own].detach()
            factors[own] = self.function(values).to(factors.dtype)
        return losses * factors


class SeenLogits(TorchFunctionMode):
    """Notes what a function makes of the logits of each cross-entropy that is computed.

    Args:
        function: Of logits `[N, C]`. Those of `linear_cross_entropy`, which never exist as a whole, have no gradient.
        noted: Gets its results, in order.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], noted: list[Tensor]) -> None:
        super().__init__()
        self.function, self.noted = function, noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and look at what a cross-entropy is given."""
        kwargs = kwargs or {}
        arguments = {**LOSSES[func], **dict(zip(LOSSES[func], args)), **kwargs} if func in LOSSES else {}
        if func is F.cross_entropy:
            self.noted.append(self.function(arguments["input"]))
        elif func is getattr(F, "linear_cross_entropy", 0):
            weight, bias = arguments["linear_weight"].detach(), arguments["linear_bias"]
            with torch.no_grad():
                chunks = arguments["input"].split(_CHUNK)
                self.noted.extend(self.function(F.linear(chunk, weight, bias)) for chunk in chunks)
        return func(*args, **kwargs)


class LossAdaptiveRateCallback(RunCallback):
    """Multiply the learning rate of each step by `sqrt(first / running)` loss, after FINCH; see `rate_factor`.

    The running loss is the mean over all processes, up to the step before. It multiplies whatever the schedule says,
    and a resumed fit continues it.

    Args:
        decay: Of the running mean of the loss, at each batch.
        most: Bound of the factor.
    """

    def __init__(self, *, decay: float = 0.9, most: float = 4.0) -> None:
        if not (0 <= decay < 1 <= most):
            raise ValueError(f"decay is {decay} and most {most}; expected decay from 0 to below 1, and most from 1.")
        self.decay, self.most = decay, most
        self.first = self.running = 0.0
        self._handles: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.first = self.running = 0.0

    @property
    def factor(self) -> float:
        """What the learning rate of the next step is multiplied by."""
        return rate_factor(self.running, self.first, self.most) if self.first > 0 else 1.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let each optimizer step at the other rate, and have its own again behind that for the schedule."""
        for optimizer in trainer.optimizers:
            rates: list[Any] = []

            def before(optimizer: Any, *_: Any, rates: list[Any] = rates) -> None:
                rates[:] = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * self.factor

            def after(optimizer: Any, *_: Any, rates: list[Any] = rates) -> None:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate

            self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the loss."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        mean = float(trainer.strategy.reduce(loss.detach().float().clone(), reduce_op="mean"))
        self.first = self.first or mean
        self.running = self.decay * (self.running or mean) + (1 - self.decay) * mean

    def state_dict(self) -> dict[str, Any]:
        """Return both losses."""
        return {"first": self.first, "running": self.running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.first, self.running = state_dict["first"], state_dict["running"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the optimizers their rates back."""
        super().teardown(trainer, pl_module, stage)
        for handle in self._handles:
            handle.remove()
        self._handles = []
