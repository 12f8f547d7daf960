"""The paper's image transforms, one recipe per family of data sets.

In: the name of a recipe, size and normalisation. Out: functions from a picture to a tensor. Next: `images.py`.
Source: the vision protocol of arXiv 2502.02797. Its sizes are 224 and, before a crop, 256. Others keep that ratio.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from flow_lightning.optional import optional_import

v2 = optional_import("torchvision.transforms.v2", "vision", "image transforms")
#: For CIFAR, Flowers102 and DTD; for Stanford Dogs and Cars; for Caltech101; for digits, which a flip would change.
RecipeName = Literal["resize_flip", "crop_jitter", "random_resized_crop", "none"]
Transform = Callable[[Any], torch.Tensor]


def larger_size(image_size: int) -> int:
    """Return the size before a crop: 256 for 224 pixels, other sizes in proportion.

    Example:
        >>> larger_size(224), larger_size(96)
        (256, 110)
    """
    return round(image_size * 256 / 224)


def interpolation_mode(name: str) -> Any:
    """Translate timm's name of an interpolation ("bilinear", "bicubic", ...).

    Raises:
        ValueError: If torchvision has no such interpolation.
    """
    try:
        return v2.InterpolationMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in v2.InterpolationMode)
        raise ValueError(f"Unknown interpolation {name!r}. Use one of {known}.") from None


def normalise(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    """Return the steps from an RGB picture to a normalised float tensor `[3, H, W]`.

    Args:
        mean: Mean of each channel, pixels in `[0, 1]`.
        std: Standard deviation of each channel.

    Raises:
        ValueError: If these are not three numbers each, or a standard deviation is not positive.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"Got mean={list(mean)} and std={list(std)}. Give three numbers each (red, green, blue, pixels from 0 to "
            "1), with standard deviations above 0."
        )
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def recipe(
    name: str, image_size: int, mean: Sequence[float], std: Sequence[float], interpolation: str = "bilinear"
) -> tuple[Transform, Transform]:
    """Build the training and the evaluation transform of a recipe.

    Args:
        name: One of `RecipeName`.
        image_size: Height and width of the result, in pixels.
        mean: Mean of each channel, pixels in `[0, 1]`.
        std: Standard deviation of each channel.
        interpolation: Name of the interpolation when resizing.

    Returns:
        Two functions from an RGB picture to a float tensor `[3, image_size, image_size]`. The second is deterministic.

    Raises:
        ValueError: If the recipe or the interpolation does not exist, or the normalisation is invalid.
    """
    if name not in get_args(RecipeName):
        raise ValueError(f"Unknown transforms {name!r}. Use one of {', '.join(get_args(RecipeName))}.")
    train, evaluation = _steps(image_size, interpolation_mode(interpolation))[name]
    tail = normalise(mean, std)
    return v2.Compose([*train, *tail]), v2.Compose([*evaluation, *tail])


def _steps(size: int, mode: Any) -> dict[str, tuple[list[Any], list[Any]]]:
    """Return the steps of every recipe, for training and for evaluation."""
    resize, centre, larger = v2.Resize((size, size), mode), v2.CenterCrop(size), larger_size(size)
    resize_larger = v2.Resize((larger, larger), mode)
    flip, jitter = v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)
    crop = v2.RandomResizedCrop(size, interpolation=mode)
    return {
        "resize_flip": ([resize, flip], [resize]),
        "crop_jitter": ([resize_larger, v2.RandomCrop(size), flip, jitter], [resize_larger, centre]),
        "random_resized_crop": ([crop, flip, jitter], [v2.Resize(larger, mode), centre]),
        "none": ([resize], [resize]),
    }
