"""All that callbacks ask of a module and of a data module. Nothing is required.

In: a module or data module of any class. Out: a view of it with every name of the contract. Next: `modules/base.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

from lightning import LightningModule, Trainer
from torch import Tensor, nn


class BatchLosses(NamedTuple):
    """The loss terms of a training batch, detached."""

    samples: Tensor | None  #: indices of its samples, `[B]`; None if the batch carries none
    losses: Tensor  #: their losses, `[B]`, or those of their tokens, `[K]`
    size: Tensor | float  #: what the mean was divided by: samples, tokens, or the sum of their weights


class ModuleContract(Protocol):
    """What callbacks ask of a module. Callables take a batch, unless stated otherwise."""

    sample_losses: Callable[[Any], Tensor] | None = None  #: one loss per sample, `[B]`; else those of training_step
    token_losses: Callable[[Any], Tensor] | None = None  #: one loss per supervised token, `[K]`: to weigh tokens
    token_counts: Callable[[Any], Tensor] | None = None  #: the number of supervised tokens of each sample, `[B]`
    top_tokens: Callable[[Any], Tensor] | None = None  #: the most likely token at each supervised position, `[K]`
    features: Callable[[Any], Tensor] | None = None  #: what the head sees, `[B, D]`; for LinearProbeCallback
    head: nn.Module | None = None  #: the last linear layer; for LinearProbeCallback
    new_parts: tuple[str, ...] = ()  #: prefixes of parameters that are not pre-trained, such as those of adapters
    #: Context in which the module is the pre-trained model, with adapters off, for instance; takes no arguments.
    frozen_reference: Callable[[], AbstractContextManager[None]] = nullcontext
    #: Context in which `forward` gives logits of the pre-training task; takes `original_batch_norm`.
    pretrained_task: Callable[..., AbstractContextManager[None]] | None = None
    pretrained_head: nn.Linear | None = None  #: of the pre-training task; None if the pre-trained weights have none
    data_config: dict[str, Any] | None = None  #: timm's: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`
    causal_lm: Any = None  #: the causal language model of transformers, for generated answers and for tasks
    tokenizer: Any = None  #: its tokenizer
    max_positions: int | None = None  #: the longest sequence that it takes, in tokens; None if it has no bound
    save_pretrained: Callable[..., None] | None = None  #: writes the model; takes a folder and `merge`
    weighs_online: bool = False  #: whether it multiplies its weights by `online_weights`, as `WeightedLossModule` does

    # Set by callbacks:
    sample_weights: Any = None  #: the weights to train with
    online_weights: Callable[[Tensor], Tensor] | None = None  #: factors of the losses `[K]` of a step, see `online.py`
    batch_samples: Tensor | None = None  #: indices of the samples in the batch, if it carries none
    flow_reference: str | None = None  #: fingerprint of the pre-trained model behind the checkpoint it is loaded from
    batch_losses: BatchLosses | None = None  #: of the last training batch, for callbacks of a `WeightedLossModule`
    run_seed: int | None = None  #: the seed of the run, as ExactResumeCallback reseeds torch's generator
    flow_run: Any = None  #: what our callbacks share during a fit


class DataContract(Protocol):
    """What callbacks ask of a data module, or of a module that brings its own loaders."""

    scoring_dataloader: Callable[[], Any] | None = None  #: the training samples, in the same order, not augmented
    class_names: list[str] | None = None  #: by index
    image_size: int | None = None  #: height and width, in pixels
    mean: list[float] | None = None  #: of each channel, pixels in `[0, 1]`
    std: list[float] | None = None  #: of each channel
    interpolation: str | None = None  #: how images are resized
    edit_numbers: dict[str, int] | None = None  #: samples dropped and relabelled by hand, for `metrics.json`
    sample_sources: Sequence[str] | None = None  #: where each training sample comes from, by index; for the report
    response_field: str = "response"  #: field of a record that holds the reference answer


class _View:
    """An owner's attributes, and the contract's defaults for those that it does not define."""

    def __init__(self, owner: Any, contract: type) -> None:
        self._owner, self._contract = owner, contract

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name, getattr(self._contract, name))


def module_contract(module: LightningModule) -> ModuleContract:
    """View a module through its contract.

    Example:
        >>> module_contract(LightningModule()).new_parts
        ()
    """
    return cast(ModuleContract, _View(module, ModuleContract))


def data_contract(trainer: Trainer) -> DataContract:
    """View the data module of a fit through its contract, or the module if there is no data module."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return cast(DataContract, _View(trainer.lightning_module if datamodule is None else datamodule, DataContract))


def image_settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return a module's `data_config`, with `mean`, `std` and `interpolation` as the data module gives them, if so."""
    data = data_contract(trainer)
    given = {"mean": data.mean, "std": data.std, "interpolation": data.interpolation}
    return (module_contract(module).data_config or {}) | {name: value for name, value in given.items() if value}
