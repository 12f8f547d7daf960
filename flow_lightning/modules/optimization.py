"""Optimizer and learning rate schedule, the same for every module of this library.

In: a module, a way to make its optimizer, a learning rate. Out: what `configure_optimizers` returns.
Next: `image_classification.py`, `causal_language.py`.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flow_lightning.method.path import block_numbers

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
Schedule = Literal["cosine", "constant"]


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Describe an optimizer by `class_path` and `init_args`, of primitives alone. `optimizer_factory` undoes it."""
    kind, primitives = type(optimizer), (bool, int, float, str, tuple, list, type(None))
    accepted = inspect.signature(kind).parameters
    known = vars(optimizer) | optimizer.defaults  # torchao's keep some settings as attributes
    kept = {key: value for key, value in known.items() if key in accepted and type(value) in primitives}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": kept}


def optimizer_factory(optimizer: OptimizerFactory | Mapping[str, Any]) -> OptimizerFactory:
    """Return a function that makes the optimizer, also from the `optimizer_settings` of a checkpoint.

    Nothing is imported, because a checkpoint must not choose what code runs: other names are a ValueError.
    """
    if not isinstance(optimizer, Mapping):
        return optimizer
    module, _, name = str(optimizer["class_path"]).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ValueError(
            f"The checkpoint's optimizer {optimizer['class_path']!r} is not known. Import its module before loading, "
            "or give `optimizer=` to load_from_checkpoint."
        )
    return partial(kind, **optimizer.get("init_args", {}))


def configure_optimizers(module: Any) -> OptimizerLRScheduler:
    """Build the optimizer over all trainable parameters, and the schedule, which moves at every step.

    The module has `optimizer`, which makes it, `learning_rate`, `schedule`, `warmup` and `layer_decay`. The optimizer's
    class and settings go into `module.hparams`, so that checkpoints keep them.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    built: Optimizer = module.optimizer(list(trained.values()))
    module.hparams["optimizer"] = optimizer_settings(built)
    for group in built.param_groups:
        old = group["lr"]  # torchao's optimizers want a tensor
        group["lr"] = torch.full_like(old, module.learning_rate) if isinstance(old, Tensor) else module.learning_rate
    if module.layer_decay != 1:
        decay_by_depth(built, trained, module.layer_decay)
    is_constant = module.schedule == "constant"
    if is_constant and module.warmup == 0:
        return built
    total = int(module.trainer.estimated_stepping_batches)
    rising: int = round(module.warmup * total)

    # A function, not an object: LambdaLR puts objects into checkpoints. A run that is resumed for more epochs would
    # find its old, finished schedule there.
    def part_of_peak(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min((step - rising) / max(1, total - rising), 1.0)
        return 1.0 if is_constant else 0.5 * (1 + math.cos(math.pi * done))

    scheduler: Any = {"scheduler": LambdaLR(built, part_of_peak), "interval": "step"}
    return {"optimizer": built, "lr_scheduler": scheduler}


def decay_by_depth(optimizer: Optimizer, parameters: Mapping[str, Parameter], decay: float) -> None:
    """Multiply learning rates by `decay ** (blocks above)`, so that early layers take smaller steps.

    A new optimizer's groups are divided by block, see `flow_lightning.method.path.depth_factors`. The last block of
    the parameters, by name, keeps its rate. A part without a number, such as a final norm, is a block of its own.
    Sources: Clark et al. (ELECTRA, arXiv 2003.10555), after Howard and Ruder (ULMFiT, arXiv 1801.06146).

    Raises:
        ValueError: If decay is not in (0, 1].

    >>> import torch
    >>> head, body = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    >>> sgd = torch.optim.SGD([body, head], lr=1.0)
    >>> decay_by_depth(sgd, {"body.bias": body, "head.bias": head}, 0.5)
    >>> [group["lr"] for group in sgd.param_groups]
    [0.5, 1.0]
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay is {decay}; expected a number above 0 and at most 1, such as 0.8.")
    numbers = block_numbers(parameters)
    of = {parameters[name]: number for name, number in numbers.items()}
    last, groups = max(of.values()), []
    for group in optimizer.param_groups:
        for number in sorted({of[parameter] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if of[parameter] == number]
            groups.append({**group, "params": members, "lr": group["lr"] * decay ** (last - number)})
    optimizer.param_groups[:] = groups
