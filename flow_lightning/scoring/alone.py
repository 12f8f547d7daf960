"""Weights for loops of any kind: plain torch, Fabric, or another trainer.

In: a model and a loader. Out: `SampleWeights`. Next: `scoring.py`, which does the work.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flow_lightning.contract import module_contract
from flow_lightning.data.samplers import FixedBatches
from flow_lightning.distributed import is_attached
from flow_lightning.method.flow import weighting_rule
from flow_lightning.method.weights import SampleWeights
from flow_lightning.scoring.kinds import SampleLosses
from flow_lightning.scoring.samples import cut_batches
from flow_lightning.scoring.scoring import Scoring
from flow_lightning.scoring.step_kinds import StepLosses


def score(
    model: nn.Module,
    loader: DataLoader[Any],
    sample_losses: Callable[[Any, Any], Tensor] | None = None,
    *,
    loss: str | None = None,
    weighting: str = "flow",
    temperature: float | None = None,
    quantile: float = 0.5,
) -> SampleWeights:
    """Compute FLOW's weights of a data set, for a training loop of any kind.

    The model is in evaluation mode meanwhile, on the device where it is. It and all random number generators are left
    as they were. Under Fabric or torchrun call it on every process: they share the work, and all get the result.

    Args:
        model: The pre-trained model, also one that `Fabric.setup` or DistributedDataParallel has wrapped.
        loader: Where the data set, its collate function, batch size and workers come from, also one of
            `Fabric.setup_dataloaders`. It is not iterated, so that its order does not matter.
        sample_losses: Gives one loss per sample, `[B]`, of `(model, batch)`, the batch on the model's device. A
            LightningModule needs none: its losses are those of its `sample_losses(batch)` or `training_step`.
        loss: The name of the one loss in a `training_step` that counts, such as "cross_entropy"; by default all.
        weighting: The rule from losses to weights, as in `FlowWeightingCallback`.
        temperature: tau, in the unit of the loss; by default a quantile of the losses.
        quantile: Which quantile of the losses is the temperature; 0.5, the median, is the paper's choice.

    Returns:
        The weights, in the order of the data set.

    Raises:
        TypeError: If the model is no LightningModule and there is no `sample_losses`, or the data set is no map-style
            one.
        ValueError: If losses are not finite, negative or not one for each sample, or if those of a `training_step`
            depend on the rest of their batch. Also if `weighting` or `quantile` has no such value.

    Example:
        >>> model, data = nn.Linear(1, 1), [(torch.tensor([float(i)]), torch.tensor([1.0])) for i in range(5)]
        >>> weights = score(model, DataLoader(data, 2), lambda m, batch: (m(batch[0]) - batch[1]).square().sum(1))
        >>> weights.of([0, 4]).shape
        torch.Size([2])

        SFTTrainer of TRL, with a `dataset` of `input_ids` and the `collator` of TRL, takes them as a column::

            def token_losses(logits, labels):
                return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")

            def losses_of(model, batch):
                losses = token_losses(model(batch["input_ids"]).logits, batch["labels"])
                return losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)

            class WeightedTrainer(SFTTrainer):
                def compute_loss(self, model, inputs, *args, **kwargs):
                    weights = inputs.pop("flow_weight")[:, None]
                    self.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
                        (weights * token_losses(outputs.logits, labels)).sum() / num_items_in_batch)
                    return super().compute_loss(model, inputs, *args, **kwargs)

            def collate(samples):
                return {**collator(samples), "flow_weight": torch.tensor([s["flow_weight"] for s in samples])}

            weights = fl.score(model, DataLoader(dataset, 8, collate_fn=collator), losses_of)
            trainer = WeightedTrainer(model, settings, data_collator=collate, train_dataset=weights.to_dataset(dataset))

        Its `settings` need `remove_unused_columns=False`, and no packing. The Trainer of transformers is in
        `SampleWeights.to_dataset`.
    """
    weighting_rule(weighting)
    module = model if isinstance(model, LightningModule) else _Wrapped(model)
    contract = module_contract(module)
    if sample_losses is None and not isinstance(model, LightningModule):
        raise TypeError(
            f"{type(model).__name__} is no LightningModule, so its losses are not known. Give "
            "score(model, loader, sample_losses), a function of (model, batch) that returns one loss per sample."
        )
    function = None if sample_losses is None else lambda _, batch: sample_losses(model, batch)
    is_own_step = function is None and contract.sample_losses is None
    kind = StepLosses(loss) if is_own_step else SampleLosses(function)
    with _trainer_of(module) as trainer:
        scoring = Scoring(trainer, module, kind, given=_plain(loader), new_parts=tuple(contract.new_parts))
        losses = scoring.scored()["losses"]
        return SampleWeights.from_losses(losses, temperature, quantile, scoring.fingerprint, weighting)


def _plain(loader: Any) -> DataLoader[Any]:
    """Return a DataLoader in place of one that Fabric has wrapped, which has its attributes but is none."""
    if isinstance(loader, DataLoader):
        return loader
    batches, workers = FixedBatches(cut_batches(loader)), loader.num_workers
    return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, num_workers=workers)


class _Wrapped(LightningModule):
    """What a Trainer takes in place of a plain model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class _Here(SingleDeviceStrategy):
    """The device where a model is, and the processes that there are already."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.is_parallel:
            self.global_rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first process."""
        return self.global_rank == 0

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether all processes must run the model equally often, as its wrapper may wait for them."""
        return self.is_parallel

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch through the hooks of the module."""
        module: Any = self.lightning_module
        return module.on_after_batch_transfer(module.transfer_batch_to_device(batch, self.root_device, 0), 0)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of process `src`."""
        objects = [obj]
        if self.is_parallel:
            torch.distributed.broadcast_object_list(objects, src)
        return objects[0]


@contextmanager
def _trainer_of(module: LightningModule) -> Iterator[Trainer]:
    """Attach a Trainer that says nothing to a module for a while; a module that has one gets it back."""
    tensors = chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    log: Any = rank_zero_module.log  # of the package imported last: lightning, or pytorch_lightning
    before, level = module.trainer if is_attached(module) else None, log.level
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    try:
        log.setLevel(logging.WARNING)
        trainer = Trainer(accelerator=device.type, devices=1, strategy=_Here(device), **settings)
        log.setLevel(level)
        module.trainer = trainer
        trainer.strategy.connect(module)
        yield trainer
    finally:
        log.setLevel(level)
        module.trainer = before
