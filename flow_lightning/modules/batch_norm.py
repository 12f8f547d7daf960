"""BatchNorm layers: the part of a network that keeps running statistics of its inputs.

In: a model. Out: its BatchNorm layers and what they hold. Next: `image_classification.py`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from flow_lightning.distributed import fill

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers of a model, by name.

    Example:
        >>> list(batch_norm_layers(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BATCH_NORMS)}


def batch_norm_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and running statistics of the BatchNorm layers, by name. They are not copied."""
    return {
        f"{name}.{key}": value
        for name, layer in batch_norm_layers(model).items()
        for key, value in layer.state_dict().items()
    }


def set_batch_norm(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the values of `batch_norm_state` into the BatchNorm layers of a model."""
    for name, value in batch_norm_state(model).items():
        fill(value, state[name])
