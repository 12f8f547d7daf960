"""All that callbacks ask of a module and of a data module. Only `sample_losses` is required; the rest has a default.

In: a module or data module of any class. Out: a view of it with every name of the contract. Next: `modules/base.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

from lightning import LightningModule, Trainer
from torch import Tensor, nn


class BatchLosses(NamedTuple):
    """The loss terms of a training batch.

    Attributes:
        samples: Indices of its samples, `[B]`; None if the batch carries none.
        losses: Their losses, `[B]`, or those of their tokens, `[K]`; detached.
        size: What the mean was divided by: samples, tokens, or the sum of their weights.
    """

    samples: Tensor | None
    losses: Tensor
    size: Tensor | float


class ModuleContract(Protocol):
    """What callbacks ask of a module.

    Attributes:
        sample_losses: Batch to one loss per sample, `[B]`; required by FlowWeightingCallback.
        token_losses: Batch to one loss per supervised token, `[K]`: required to weigh tokens.
        token_counts: Batch to the number of supervised tokens of each sample, `[B]`.
        features: Batch to what the head sees, `[B, D]`: required by LinearProbeCallback.
        head: The last linear layer: required by LinearProbeCallback.
        new_parts: Prefixes of parameters that are not pre-trained, such as those of adapters.
        frozen_reference: Context in which the module is the pre-trained model, with adapters off, for instance.
        pretrained_task: Context in which `forward` gives logits of the pre-training task; takes `original_batch_norm`.
        pretrained_head: The head of the pre-training task; None if the pre-trained weights have none.
        data_config: timm's description of the input: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
        causal_lm: The causal language model of transformers, for generated answers and for tasks.
        tokenizer: Its tokenizer.
        max_positions: The longest sequence that it takes, in tokens; None if it has no bound.
        save_pretrained: Writes the model into a folder in the format of transformers; takes `merge`.
        sample_weights: Set by FlowWeightingCallback: the weights to train with.
        batch_samples: Set by FlowWeightingCallback: indices of the samples in the batch, if it carries none.
        flow_reference: Fingerprint of the pre-trained model behind the checkpoint that the module was loaded from.
        batch_losses: The losses of the last training batch, for the callbacks that a `WeightedLossModule` brings along.
        run_seed: Set by ExactResumeCallback, which reseeds torch's generator: the seed of the run.
        flow_run: Set by our callbacks: what they share during a fit.
    """

    sample_losses: Callable[[Any], Tensor] | None = None
    token_losses: Callable[[Any], Tensor] | None = None
    token_counts: Callable[[Any], Tensor] | None = None
    features: Callable[[Any], Tensor] | None = None
    head: nn.Module | None = None
    new_parts: tuple[str, ...] = ()
    frozen_reference: Callable[[], AbstractContextManager[None]] = nullcontext
    pretrained_task: Callable[..., AbstractContextManager[None]] | None = None
    pretrained_head: nn.Linear | None = None
    data_config: dict[str, Any] | None = None
    causal_lm: Any = None
    tokenizer: Any = None
    max_positions: int | None = None
    save_pretrained: Callable[..., None] | None = None
    sample_weights: Any = None
    batch_samples: Tensor | None = None
    flow_reference: str | None = None
    batch_losses: BatchLosses | None = None
    run_seed: int | None = None
    flow_run: Any = None


class DataContract(Protocol):
    """What callbacks ask of a data module, or of a module that brings its own loaders.

    Attributes:
        scoring_dataloader: Loader of the training samples, in the same order, without augmentation.
        class_names: Names of the classes, by index.
        image_size: Height and width of the images, in pixels.
        mean: Mean of each channel, pixels in `[0, 1]`.
        std: Standard deviation of each channel.
        interpolation: How images are resized.
        response_field: Field of a record that holds the reference answer.
    """

    scoring_dataloader: Callable[[], Any] | None = None
    class_names: list[str] | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    response_field: str = "response"


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
    return cast(DataContract, _View(data_owner(trainer), DataContract))


def data_owner(trainer: Trainer) -> Any:
    """Return the data module of a fit, or the module if there is none."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return trainer.lightning_module if datamodule is None else datamodule
