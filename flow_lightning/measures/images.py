"""The two tasks a fit is measured on: where their data come from, and what a batch says about them."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.retention_images import RetentionImages, retention_images
from flow_lightning.measures.metrics import kl_divergences, top_k_correct
from flow_lightning.method.losses import cross_entropy


def target_dataloader(trainer: Trainer, module: LightningModule, batch_size: int) -> DataLoader[Any] | None:
    """Find the test set of the data module or the module, and number its samples by position.

    Args:
        trainer: May have a data module.
        module: Is asked where the data module has no `test_dataloader()`.
        batch_size: Used where the loader found has none.

    Returns:
        A loader in the order of the data set, or None if there is no test set.

    Raises:
        TypeError: If it is not one DataLoader of a map-style data set.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    candidates = [owner for owner in (datamodule, module) if owner is not None]
    owners = [owner for owner in candidates if is_overridden("test_dataloader", owner)]
    if not owners:
        return None
    try:
        loader = owners[0].test_dataloader()
    except (AttributeError, TypeError):
        # A fit sets up the training part only. Otherwise leave it: a data module may split anew in a setup.
        owners[0].setup("test")
        loader = owners[0].test_dataloader()
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"{type(owners[0]).__name__}.test_dataloader() gave a {type(loader).__name__}; expected one "
            "DataLoader of the target test set. Return a single DataLoader."
        )
    workers = loader.num_workers
    return DataLoader(
        IndexedDataset(loader.dataset),
        batch_size=loader.batch_size or batch_size,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
    )


def pretrained_task_images(path: str, image_size: int | None, trainer: Trainer, module: Any) -> RetentionImages:
    """Open the images of the pre-trained task, prepared as those of the target task.

    Size, mean, standard deviation and interpolation are those that the data module sets, else what the model
    expects.

    Args:
        path: See `retention_images`.
        image_size: Side in pixels, if not the data module's or the model's.
        trainer: May have a data module.
        module: Has `data_config` and `pretrained_head`.

    Raises:
        TypeError: If the module cannot put its original head back.
        ValueError: If there was no original head.
    """
    _check_pretrained_task(module)
    config, datamodule = module.data_config, trainer.datamodule  # type: ignore[attr-defined]
    names = ("mean", "std", "interpolation")
    settings = {name: getattr(datamodule, name, None) or config[name] for name in names}
    size = image_size or getattr(datamodule, "image_size", None) or config["input_size"][-1]
    classes = module.pretrained_head.out_features
    return retention_images(path, size, crop_pct=config["crop_pct"], num_classes=classes, **settings)


def _check_pretrained_task(module: LightningModule) -> None:
    name = type(module).__name__
    if not callable(getattr(module, "pretrained_task", None)):
        raise TypeError(
            f"{name} has no pretrained_task(), so its original head cannot be put back. Use "
            f"ImageClassificationModule, give {name} that method, or leave out RetentionCallback(images=...)."
        )
    if getattr(module, "pretrained_head", None) is None:
        raise ValueError(
            f"{name} has no pre-trained head: its checkpoint holds a body only, so there is no pre-trained "
            "task to measure. Use a checkpoint with its classifier, or leave out "
            "RetentionCallback(images=...)."
        )


def target_outcomes(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Return loss in nats and top-1 (0 or 1) of each sample, both `[B]`."""
    logits = _logits(module, batch)
    return cross_entropy(logits, batch["target"]), top_k_correct(logits, batch["target"]).float()


def top1_and_top5(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Return top-1 and top-5 (0 or 1) of each sample, both `[B]`."""
    logits = _logits(module, batch)
    return top_k_correct(logits, batch["target"]).float(), top_k_correct(logits, batch["target"], k=5).float()


def log_probabilities(module: LightningModule, batch: Any) -> tuple[Tensor]:
    """Return the log-probabilities `[B, C]`, float32."""
    return (_logits(module, batch).log_softmax(dim=1),)


def agreement_and_kl(module: LightningModule, reference: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Compare with the reference's log-probabilities `[n, C]`.

    Returns:
        Whether the first choice is the same (0 or 1) and the KL divergence in nats, both `[B]`.
    """
    logits = _logits(module, batch)
    expected = reference[batch["index"].cpu()].to(logits.device)
    return top_k_correct(logits, expected.argmax(dim=1)).float(), kl_divergences(expected, logits)


def _logits(module: LightningModule, batch: Any) -> Tensor:
    if not isinstance(batch, dict) or "image" not in batch:
        found = f"a dict of {sorted(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise TypeError(
            f"RetentionCallback got {found}; expected batches that are dicts with 'image' and 'target'. Let "
            "the data set return such dicts."
        )
    logits: Tensor = module(batch["image"])
    return logits.float()
