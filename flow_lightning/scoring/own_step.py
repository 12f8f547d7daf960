"""A module's own `training_step`, run so that nothing of it gets through: no log, no step, no change of state.

In: Trainer, module and batch. Out: the loss of the batch, and what was seen on the way. Next: `kinds.py`.
"""

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from flow_lightning.scoring.fingerprint import model_fingerprints

#: Methods of a module that a training step may call, and that do nothing meanwhile.
_SILENT = ("log", "log_dict", "print", "backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
#: What cannot change: most of what a module's attributes hold.
_FIXED = (int, float, complex, str, bytes, type(None), type)
#: What a meter holds.
_PLAIN = (int, float, complex, str, bytes, type(None), Tensor, np.ndarray, np.generic, list, dict, tuple, set, deque)
#: Losses below are squares of rounding errors, of numbers near 1 in 32 bits.
_ROUNDING = 1e-12
#: What to do about a training_step whose losses cannot be weighed.
HOW_TO_GIVE_LOSSES = (
    "Give the losses yourself, one per sample: FlowWeightingCallback(sample_losses=lambda module, batch: ...), or a "
    "sample_losses(batch) that training_step calls."
)


@contextmanager
def unnoticed(trainer: Trainer, module: LightningModule) -> Iterator[Callable[[Any], Tensor | None]]:
    """Run training steps without a trace: nothing is logged or optimised, and the module's state is put back.

    Put back are buffers, metrics, and all attributes of the module and its parts, with what containers, tensors, arrays
    and meters among them hold. Parameters are not kept twice; a step that changes them is refused at the end.

    Yields:
        A function that takes what `training_step` returned, and returns its loss; None if it gave none. With manual
        optimisation that is the sum of the losses given to `manual_backward`.

    Raises:
        RuntimeError: If a step changed parameters.
    """
    put_back: dict[int, Callable[[], None]] = {}
    _remember(module, put_back)
    before = model_fingerprints(dict(module.named_parameters()))
    loggers, should_stop = trainer.loggers, trainer.should_stop
    manual: list[Tensor] = []
    vars(module).update(dict.fromkeys(_SILENT, _nothing))
    vars(module)["manual_backward"] = lambda loss, *args, **kwargs: manual.append(loss)
    for name in ("optimizers", "lr_schedulers"):
        vars(module)[name] = _idle(getattr(module, name))
    trainer.loggers = [DummyLogger() for _ in loggers]

    def loss_of(output: Any) -> Tensor | None:
        loss: Any = sum(manual) if manual else output.get("loss") if isinstance(output, Mapping) else output
        manual.clear()
        return loss  # type: ignore[no-any-return]

    try:
        yield loss_of
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop
        for restore in put_back.values():
            restore()
    after = model_fingerprints(dict(module.named_parameters()))
    if changed := [name for name in before if before[name] != after.get(name)]:
        raise RuntimeError(
            f"{type(module).__name__}.training_step changes parameters by itself ({changed[0]}), so it cannot be run "
            "for scoring. Move that to on_train_batch_end, or give FlowWeightingCallback(sample_losses=...)."
        )


def call_training_step(module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """Call a module's own training step, without weights, with the arguments that it takes, as Lightning does."""
    step: Any = getattr(module.training_step, "own", module.training_step)
    arguments = [batch_idx] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
    return step(batch, *arguments)


def dependent(module: LightningModule, losses: Tensor) -> ValueError:
    """Return the error of a step whose losses `[B]` of the same samples differ from batch to batch."""
    name, most = f"{type(module).__name__}.training_step", float(losses.max())
    if most < _ROUNDING:
        return ValueError(
            f"In {name} the losses of samples are at most {most:.0e}, which is rounding alone: they differ from "
            "batch to batch. The model fits these samples already. Train without FlowWeightingCallback, or in 64-bit "
            "precision."
        )
    return ValueError(
        f"In {name} the loss of a sample depends on the others in its batch (contrastive losses, mixup, top-k), or its "
        f"row is not its place in the batch. {HOW_TO_GIVE_LOSSES}"
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _idle(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return what gives the same optimizers or schedulers, which do nothing."""

    def idle(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        return [_Idle(each) for each in found] if isinstance(found, list) else None if found is None else _Idle(found)

    return idle


class _Idle:
    """An optimizer or scheduler that does nothing, but calls the closure that it is given."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        return None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _remember(value: Any, put_back: dict[int, Callable[[], None]]) -> None:
    """Add functions, by id, that put back what a value and all in it hold now, where that has changed."""
    if isinstance(value, (*_FIXED, torch.nn.Parameter)) or id(value) in put_back:
        return
    put_back[id(value)], parts = _nothing, []
    if isinstance(value, Tensor | np.ndarray):
        put_back[id(value)] = _remember_numbers(value)
    elif isinstance(value, torch.nn.Module):
        parts = [vars(part) for part in value.modules()]
    elif isinstance(value, MutableMapping | MutableSequence | MutableSet):
        put_back[id(value)] = _remember_items(value)
        parts = list(value.values() if isinstance(value, MutableMapping) else value)
    elif isinstance(value, tuple):
        parts = list(value)
    elif _is_record(value):
        parts = [vars(value)]
    for part in parts:
        _remember(part, put_back)


def _remember_items(value: Any) -> Callable[[], None]:
    before = _items(value)

    def restore() -> None:
        now = _items(value)
        if len(now) == len(before) and all(map(_is_same, now, before)):
            return
        value.clear()
        if isinstance(value, MutableMapping):
            MutableMapping.update(value, before)  # that of a Counter adds
        else:
            add = value.append if isinstance(value, MutableSequence) else value.add
            for item in before:
                add(item)

    return restore


def _remember_numbers(value: Any) -> Callable[[], None]:
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array) if value.flags.writeable else None
    copy = value.detach().clone()

    @torch.no_grad()
    def restore() -> None:  # an expanded tensor, or one made in inference mode, refuses even its own values
        if value.layout != torch.strided or not torch.equal(value, copy):
            value.copy_(copy)

    return restore


def _items(value: Any) -> list[Any]:
    return list(value.items() if isinstance(value, MutableMapping) else value)


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two items are one object; of a dict, key and value."""
    return one is other or (isinstance(one, tuple) and len(one) == len(other) and all(map(operator.is_, one, other)))


def _is_record(value: Any) -> bool:
    """Tell whether a value is an object that holds numbers and containers alone, as a meter does."""
    return hasattr(value, "__dict__") and all(isinstance(item, _PLAIN) for item in vars(value).values())
