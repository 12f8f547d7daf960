"""Flips, colours and normalisation of whole batches, on the device: loaders hand over bytes, a quarter as many.

In: pictures. Out: bytes and random draws, and of a batch of them the images that one by one they would have become.
Next: `transforms.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

_NAMES = ("brightness_factor", "contrast_factor", "saturation_factor")


class BytesAndDraws:
    """Turn an RGB picture into bytes and what is to become of them: `{"image": uint8 [3, H, W], "numbers": ...}`.

    Resizing and cropping are done here. A flip is drawn as `flip`, bool; changes of colour as `order` `[4]`, as
    torchvision has it. `numbers` are mean and standard deviation of each channel, and the factors of brightness,
    contrast and saturation. They are the bits of `[6]` or `[9]` float32: floats would be rounded in `bf16-true`. All
    draws are those that the same transforms would make.
    """

    def __init__(self, steps: Sequence[Any], mean: Sequence[float], std: Sequence[float]) -> None:
        late = v2.RandomHorizontalFlip | v2.ColorJitter
        self.early = v2.Compose([*(step for step in steps if not isinstance(step, late)), v2.PILToTensor()])
        self.late, self.normal = [step for step in steps if isinstance(step, late)], [*mean, *std]

    def __call__(self, picture: Any) -> dict[str, Tensor]:
        """Return the bytes and draws of a picture."""
        sample, numbers = {"image": self.early(picture)}, self.normal
        for step in self.late:
            if isinstance(step, v2.RandomHorizontalFlip):
                sample["flip"] = torch.rand(1)[0] < step.p
            else:
                drawn = step.make_params([])
                sample["order"], numbers = drawn["fn_idx"], [*numbers, *(drawn[name] for name in _NAMES)]
        return sample | {"numbers": torch.tensor(numbers, dtype=torch.float32).view(torch.int32)}


def finish(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with finished images, float32 `[B, 3, H, W]`, if it has bytes; another one stays as it is."""
    image = batch["image"]
    if image.dtype != torch.uint8:
        return batch
    if "flip" in batch:
        image = torch.where(batch["flip"][:, None, None, None], image.flip(-1), image)
    image, numbers = image.float().mul_(1 / 255), batch["numbers"].view(torch.float32)[..., None, None]
    if "order" in batch:
        image = _coloured(image, batch["order"], numbers[:, 6:])
    others = {key: value for key, value in batch.items() if key not in ("numbers", "flip", "order")}
    return others | {"image": (image - numbers[:, :3]) / numbers[:, 3:6]}


def _coloured(image: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of each image `[B, 3, H, W]` by factors `[B, 3, 1, 1]`, in its order.

    Each change goes from something (black, the mean grey, the grey of each pixel) to the image, or beyond it. All
    images of a batch take their first change at once, and so on; nothing here waits for the device.
    """
    factors = torch.cat([factors, torch.ones_like(factors[:, :1])], dim=1)  # the fourth is of hue, which stays
    for kind in order[..., None, None].unbind(1):
        kind = kind[:, None]
        red, green, blue = image.split(1, dim=1)
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue  # as torchvision has it
        away = torch.where(kind == 0, 0.0, torch.where(kind == 1, grey.mean((2, 3), keepdim=True), grey))
        image = torch.lerp(away, image, factors.gather(1, kind)).clamp_(0, 1)
    return image
