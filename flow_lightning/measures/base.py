"""What a measure is: numbers of a model before and after training, and how tables and pictures show them.

In: Trainer and module. Out: numbers by name. Next: `target.py`, then one file for each kind of data.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from lightning import LightningModule, Trainer
from torch import Tensor

When = Literal["before", "epoch", "after"]


class Metric(NamedTuple):
    """One key of `metrics.json`."""

    key: str  #: one that ends in `*` stands for all keys that begin like it
    name: str  #: what a table calls it; a `*` stands for the rest of the key
    unit: str  #: `fraction` (0 to 1, shown in percent), `nats`, `samples`, `tokens`, `seconds` or `number`
    better: str = ""  #: `up`, `down`, or nothing where neither end is good


class Panel(NamedTuple):
    """What the picture of a run shows of a measure."""

    title: str  #: what is shown: "target accuracy"; `unit` and `better` are as in `Metric`
    unit: str
    better: str
    main: str  #: the key of the main result
    after: Mapping[str, str] = {}  #: label of each bar after training to its key; by default the main result

    @property
    def part(self) -> str:
        """The part that it belongs to, see `Measure`."""
        return self.main.partition("/")[0]

    @property
    def before(self) -> str:
        """The key of the main result before training."""
        return f"{self.part}/before/{self.main.rpartition('/')[2]}"

    @property
    def bars_after(self) -> Mapping[str, str]:
        """Label of each bar after training to its key."""
        return self.after or {"after": self.main}

    @property
    def is_percent(self) -> bool:
        """Whether the values are fractions, shown in percent."""
        return self.unit == "fraction"


class Measure(ABC):
    """Something that RetentionCallback measures before and after training; derive your own from it.

    Attributes:
        part: `target`: what the fit learned. `retention`: what it kept; only this is also measured after epochs.
        metrics: The keys that it writes.
        panels: What pictures show of them; those without a value are left out.
        carried: Names of the attributes that a checkpoint carries: tensors and primitives, None before training.
        answers: The class that the model chose for each sample, `[n]`: `before` and `after`. `given` has the labels, if
            there are some. For reports; None of a measure without classes.

    >>> class NormOfWeights(Measure):
    ...     part = "retention"
    ...     metrics = (Metric("retention/after/norm", "norm of the weights", "number"),)
    ...     def measure(self, trainer, module, when):
    ...         return {"norm": sum(p.square().sum().item() for p in module.parameters()) ** 0.5}
    >>> NormOfWeights().key("after", "norm")
    'retention/after/norm'
    """

    part: ClassVar[Literal["target", "retention"]]
    metrics: ClassVar[tuple[Metric, ...]]
    panels: ClassVar[tuple[Panel, ...]] = ()
    carried: ClassVar[tuple[str, ...]] = ()
    answers: dict[str, Tensor] | None = None

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Find the data, at `on_fit_start`; return facts about them by key, which a resumed fit must find again."""
        return {}

    @abstractmethod
    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Return numbers of the module as it is now, by name, the same on every rank; none if there is no data."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs."""
        return {name: getattr(self, name) for name in self.carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier fit; an empty one at the start of each fit."""
        for name in self.carried:
            setattr(self, name, state.get(name))

    def note(self, when: When, chosen: Tensor, given: Tensor | None = None) -> None:
        """Keep the chosen classes `[n]` of a model, before or after training, and the given ones if there are some."""
        if when != "epoch":
            labels = {} if given is None else {"given": given.int()}
            self.answers = (self.answers or {}) | labels | {when: chosen.int()}

    def key(self, when: When, name: str) -> str:
        """Return the key in `metrics.json` of a number that `measure` returned."""
        return f"target/{name}" if (self.part, when) == ("target", "after") else f"{self.part}/{when}/{name}"


def check_at_least(least: int, **arguments: int | None) -> None:
    """Refuse arguments below `least` with a ValueError; None is allowed."""
    for name, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}.")
