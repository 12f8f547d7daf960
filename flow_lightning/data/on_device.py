"""Flips, colours and normalisation of whole batches, on the device: loaders hand over bytes, a quarter as many.

In: pictures. Out: bytes and random draws, and of a batch of them the images that one by one they would have become.
Next: `transforms.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

#: Shares of red, green and blue in the grey that contrast and saturation go back to, as torchvision has them.
_GREY = (0.2989, 0.587, 0.114)


class BytesAndDraws:
    """Turn an RGB picture into `{"image": uint8 [3, H, W], ...}`, and draw what is to become of it on the device.

    Resizing and cropping are done here. A flip is drawn as `flip`, bool; changes of colour as `factors` `[3]`, of
    brightness, contrast and saturation, and `order` `[4]`, as torchvision orders them. All draws are those that the
    same transforms would make.
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        late = v2.RandomHorizontalFlip | v2.ColorJitter
        self.early = v2.Compose([*(step for step in steps if not isinstance(step, late)), v2.PILToTensor()])
        self.late = [step for step in steps if isinstance(step, late)]

    def __call__(self, picture: Any) -> dict[str, Tensor]:
        """Return the bytes and draws of a picture."""
        sample = {"image": self.early(picture)}
        for step in self.late:
            if isinstance(step, v2.RandomHorizontalFlip):
                sample["flip"] = torch.rand(1)[0] < step.p
            else:
                drawn = step.make_params([])
                names = ("brightness_factor", "contrast_factor", "saturation_factor")
                sample |= {"order": drawn["fn_idx"], "factors": torch.tensor([drawn[name] for name in names])}
        return sample


def finish(batch: dict[str, Any], normalise: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a batch with finished images, float `[B, 3, H, W]`, if it has bytes; another one stays as it is."""
    image = batch["image"]
    if image.dtype != torch.uint8:
        return batch
    if "flip" in batch:
        image = torch.where(batch["flip"][:, None, None, None], image.flip(-1), image)
    if "order" in batch:
        image = _coloured(image, batch["order"], batch["factors"])
    others = {key: value for key, value in batch.items() if key not in ("flip", "order", "factors")}
    return others | {"image": normalise(image)}


def _coloured(image: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of each image `[B, 3, H, W]` by its factors `[B, 3]`, in its order.

    Each change goes from something (black, the mean grey, the grey of each pixel) to the image, or beyond it. All
    images of a batch take their first change at once, and so on; a GPU never waits for numbers of the CPU.
    """
    image, shares = image.float() / 255, torch.tensor(_GREY, device=image.device)[:, None, None]
    factors = torch.cat([factors, torch.ones_like(factors[:, :1])], dim=1)  # the fourth is of hue, which stays
    for kind in order.T:
        factor = factors.gather(1, kind[:, None])[..., None, None]
        grey, kind = (image * shares).sum(1, keepdim=True), kind[:, None, None, None]
        away = torch.where(kind == 0, 0.0, torch.where(kind == 1, grey.mean((2, 3), keepdim=True), grey))
        image = torch.lerp(away, image, factor).clamp_(0, 1)
    return image
