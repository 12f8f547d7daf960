"""A module's own `training_step`, run so that nothing of it gets through: no log, no step, no change of state.

In: Trainer, module and batch. Out: the loss of the batch, and what was seen on the way. Next: `kinds.py`.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from flow_lightning.scoring.fingerprint import model_fingerprints

#: Methods of a module that a training step may call, and that do nothing meanwhile.
_SILENT = ("log", "log_dict", "print", "backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")


@contextmanager
def unnoticed(trainer: Trainer, module: LightningModule) -> Iterator[Callable[[Any], Tensor | None]]:
    """Run training steps without a trace: nothing is logged or optimised, and the module's state is put back.

    Put back are buffers, metrics, and all attributes of the module and its parts, with what lists, dicts and tensors
    among them hold. Parameters are not kept twice; a step that changes them is refused at the end.

    Yields:
        A function that takes what `training_step` returned, and returns its loss; None if it gave none. With manual
        optimisation that is the sum of the losses given to `manual_backward`.

    Raises:
        RuntimeError: If a step changed parameters.
    """
    seen: set[int] = set()
    put_back = [_remember(vars(part), seen) for part in module.modules()]
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
        for restore in put_back:
            restore()
    after = model_fingerprints(dict(module.named_parameters()))
    if changed := [name for name in before if before[name] != after.get(name)]:
        raise RuntimeError(
            f"{type(module).__name__}.training_step changes parameters by itself ({changed[0]}), so it cannot be run "
            "for scoring. Move that to on_train_batch_end, or give FlowWeightingCallback(sample_losses=...)."
        )


def call_training_step(module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """Call a training step with the arguments that it takes, as Lightning does."""
    step: Any = module.training_step
    arguments = [batch_idx] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
    return step(batch, *arguments)


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


def _remember(value: Any, seen: set[int]) -> Callable[[], None]:
    """Return a function that gives a container what it holds now, and tensors in it their values."""
    if id(value) in seen or isinstance(value, torch.nn.Parameter):
        return _nothing
    seen.add(id(value))
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return lambda: _copy(value, copy)
    if not isinstance(value, MutableMapping | MutableSequence | MutableSet):
        return _nothing
    items = list(value.items() if isinstance(value, MutableMapping) else value)
    inner = [_remember(item, seen) for item in (value.values() if isinstance(value, MutableMapping) else items)]

    def restore() -> None:
        value.clear()
        if isinstance(value, MutableSequence):
            value.extend(items)
        else:
            cast(Any, value).update(items)
        for each in inner:
            each()

    return restore


@torch.no_grad()
def _copy(to: Tensor, values: Tensor) -> None:
    to.copy_(values)
