"""Real photographs that come with Python packages: retention can be measured on them without any download."""

from importlib.util import find_spec
from pathlib import Path

# Colour photographs of everyday things only: no drawings, microscopy, textures or star fields.
_PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "skimage/data": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "foolbox/data": ("imagenet_*_*.jpg",),
}


def packaged_photographs() -> list[Path]:
    """List the photographs that scikit-image (5), scikit-learn (2) and foolbox (20, from ImageNet) carry.

    The packages are only located, not imported.

    Raises:
        ModuleNotFoundError: If a package is not installed; the message gives the pip line.
        FileNotFoundError: If a package lacks a photograph.
    """
    photographs: list[Path] = []
    for place, patterns in _PHOTOGRAPHS.items():
        package, _, folder = place.partition("/")
        inside = _package_folder(package) / folder
        for pattern in patterns:
            found = sorted(inside.glob(pattern))
            if not found:
                raise FileNotFoundError(f"Looked for {inside / pattern}; this version of {package} does not carry it.")
            photographs.extend(found)
    return photographs


def crop_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Cut overlapping square views from a picture: 3 x 3 of 3/4 of its shorter side, 3 x 3 of 1/2.

    Args:
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.

    Returns:
        18 boxes (left, upper, right, lower), in pixels.

    Example:
        >>> crop_boxes(100, 80)[0], crop_boxes(100, 80)[8], crop_boxes(100, 80)[17]
        ((0, 0, 60, 60), (40, 20, 100, 80), (60, 40, 100, 80))
    """
    boxes = []
    for share in (0.75, 0.5):
        side = round(share * min(width, height))
        for row in range(3):
            for column in range(3):
                left, upper = (width - side) * column // 2, (height - side) * row // 2
                boxes.append((left, upper, left + side, upper + side))
    return boxes


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The packaged retention images need {package}, which is not installed: "
            "pip install 'flow-lightning[quickstart]'.",
            name=package,
        )
    return Path(spec.submodule_search_locations[0])
