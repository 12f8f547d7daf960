"""The paper's image transforms, one recipe per family of data sets.

In: the name of a recipe, size and normalisation. Out: functions from a picture to a tensor. Next: `images.py`.
Source: the vision protocol of arXiv 2502.02797. Its sizes are 224 and, before a crop, 256. Others keep that ratio.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torchvision.transforms import v2

from flow_lightning.data.on_device import BytesAndDraws

#: For CIFAR, Flowers102 and DTD; for Stanford Dogs and Cars; for Caltech101; for digits, which a flip would change.
RecipeName = Literal["resize_flip", "crop_jitter", "random_resized_crop", "none"]
Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Transform = Callable[[Any], Any]


def normalise(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    """Return the steps from bytes `[..., 3, H, W]` to a normalised float tensor, or raise ValueError."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"Got mean={list(mean)} and std={list(std)}. Give three numbers each, with std above 0.")
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def stored_size(name: RecipeName, image_size: int) -> int:
    """Return the height and width to which all transforms of a recipe resize first, or raise ValueError if none do.

    Resizing to the size that an image has already leaves it as it is. So an image that was resized before goes through
    the same transforms to the same values.
    """
    if name == "random_resized_crop":
        raise ValueError(
            "The recipe random_resized_crop crops from images of their own sizes, so decoded images of one size do not "
            "serve it. Leave `decoded` out, or choose transforms such as crop_jitter."
        )
    return _larger(image_size) if name == "crop_jitter" else image_size


def _larger(image_size: int) -> int:
    return round(image_size * 256 / 224)


def recipe(
    name: str,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    on_device: bool = False,
) -> tuple[Transform, Transform]:
    """Build the training transform of a recipe and the evaluation transform, which is deterministic.

    Both turn an RGB picture into a float tensor `[3, image_size, image_size]`; `on_device`, into what `on_device.py`
    makes that of. `mean` and `std` are of pixels from 0 to 1. ValueError names a recipe or an interpolation that does
    not exist.
    """
    mode, larger = v2.InterpolationMode(interpolation), _larger(image_size)
    resize, centre = v2.Resize((image_size, image_size), mode), v2.CenterCrop(image_size)
    resize_larger = v2.Resize((larger, larger), mode)
    flip, jitter = v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)
    random_crop = v2.RandomResizedCrop(image_size, interpolation=mode)
    recipes = {
        "resize_flip": ([resize, flip], [resize]),
        "crop_jitter": ([resize_larger, v2.RandomCrop(image_size), flip, jitter], [resize_larger, centre]),
        "random_resized_crop": ([random_crop, flip, jitter], [v2.Resize(larger, mode), centre]),
        "none": ([resize], [resize]),
    }
    if name not in recipes:
        raise ValueError(f"Unknown transforms {name!r}. Use one of {', '.join(recipes)}.")
    normal = normalise(mean, std)
    if on_device:
        train, evaluation = (BytesAndDraws(steps, mean, std) for steps in recipes[name])
    else:
        train, evaluation = (v2.Compose([*steps, v2.PILToTensor(), *normal]) for steps in recipes[name])
    return train, evaluation
