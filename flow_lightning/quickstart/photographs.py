"""Real photographs that come with Python packages: retention can be measured on them without any download.

In: nothing. Out: image files, and boxes to cut from them. Next: `data/retention_images.py`.
"""

from pathlib import Path

from flow_lightning.optional import package_folder

# Colour photographs of everyday things only: no drawings, microscopy, textures or star fields.
_PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "skimage/data": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "foolbox/data": ("imagenet_*_*.jpg",),
}


def packaged_photographs() -> list[Path]:
    """List the photographs that scikit-image (5), scikit-learn (2) and foolbox (20, from ImageNet) carry.

    ImportError gives the pip line of a missing package, and FileNotFoundError names a missing photograph.
    """
    photographs: list[Path] = []
    for place, patterns in _PHOTOGRAPHS.items():
        package, _, folder = place.partition("/")
        inside = package_folder(package, "quickstart", "the packaged retention images") / folder
        for pattern in patterns:
            files = sorted(inside.glob(pattern))
            if not files:
                raise FileNotFoundError(f"This version of {package} lacks {inside / pattern}. Install another.")
            photographs.extend(files)
    return photographs


def crop_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Return 18 overlapping square boxes in pixels: 3 x 3 of 3/4 of a picture's shorter side, 3 x 3 of 1/2.

    Example:
        >>> crop_boxes(100, 80)[0], crop_boxes(100, 80)[8], crop_boxes(100, 80)[17]
        ((0, 0, 60, 60), (40, 20, 100, 80), (60, 40, 100, 80))
    """
    return [
        (left, upper, left + side, upper + side)
        for side in (round(share * min(width, height)) for share in (0.75, 0.5))
        for upper in ((height - side) * row // 2 for row in range(3))
        for left in ((width - side) * column // 2 for column in range(3))
    ]
