"""Images of the pre-training task, on which retention is measured.

In: a folder, a CSV file or the word `packaged`. Out: a data set. Next: `measures/images.py`.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch.utils.data import Dataset
from torchvision.transforms import v2

from flow_lightning.data.sources import IMAGE_SUFFIXES, class_folders, image_paths, read_image
from flow_lightning.data.transforms import Transform, interpolation_mode, normalise
from flow_lightning.quickstart.photographs import crop_boxes, packaged_photographs


class View(NamedTuple):
    """An image file, its class index if known, and the box to crop (left, upper, right, lower; in pixels)."""

    file: Path
    target: int | None = None
    box: tuple[int, int, int, int] | None = None


class RetentionImages(Dataset[dict[str, Any]]):
    """Images as `{"image": float [3, H, W], "index": int}`, with "target" where the class indices are known.

    Args:
        views: The images; either all of them have a target or none.
        transform: From an RGB picture to a tensor.
    """

    def __init__(self, views: Sequence[View], transform: Transform) -> None:
        self.views, self.transform = views, transform
        self.labelled = views[0].target is not None

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, target, box = self.views[index]
        image = _read_shared(file).crop(box) if box else read_image(file)
        sample = {"image": self.transform(image), "index": index}
        return {**sample, "target": target} if self.labelled else sample


def retention_images(
    path: str | Path,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    num_classes: int = 1000,
) -> RetentionImages:
    """Open the images on which retention is measured.

    `path` is one of

    - a folder of class folders, as ImageNet's validation set: named by class index ("0", "1", ...), or by
      ImageNet identifiers ("n01440764": any part of ImageNet-1K), or exactly `num_classes` folders, whose
      sorted order gives the index. A folder `val` inside is taken instead;
    - a CSV file with the columns `file` (relative to the CSV) and `class_index`;
    - any other folder: all images below it, without labels;
    - the word "packaged": 513 views of 27 photographs that come with scikit-image, scikit-learn and foolbox,
      without labels.

    Args:
        path: See above.
        image_size: Height and width of the network's input, in pixels.
        mean: Mean of each channel, pixels in `[0, 1]`.
        std: Standard deviation of each channel.
        interpolation: How images are resized.
        crop_pct: Share of the resized shorter side that the centre crop keeps, in `(0, 1]`.
        num_classes: Number of classes of the pre-trained head.

    Raises:
        FileNotFoundError: If there is no such path, no image in it, or a listed file is absent.
        ValueError: If labels cannot be read, or `crop_pct` is out of range.
    """
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"crop_pct is {crop_pct}; expected a share above 0, up to 1.")
    views = list(_packaged_views() if str(path) == "packaged" else _find_views(Path(path), num_classes))
    if not views:
        raise FileNotFoundError(
            f"Retention images: no image files in {Path(path).resolve()} (looked for {', '.join(IMAGE_SUFFIXES)})."
        )
    resize = v2.Resize(round(image_size / crop_pct), interpolation_mode(interpolation))
    transform = v2.Compose([resize, v2.CenterCrop(image_size), *normalise(mean, std)])
    return RetentionImages(views, transform)


def _packaged_views() -> Iterator[View]:
    for file in packaged_photographs():
        with Image.open(file) as image:
            boxes = crop_boxes(*image.size)
        yield View(file)
        yield from (View(file, box=box) for box in boxes)


def _find_views(path: Path, num_classes: int) -> Iterator[View]:
    if path.is_file() and path.suffix.lower() == ".csv":
        return _csv_views(path, num_classes)
    if not path.is_dir():
        raise FileNotFoundError(
            f"Retention images: {path.resolve()} is no folder and no .csv file. Expected a folder of class folders, a "
            "folder of images, a CSV file with the columns file and class_index, or the word 'packaged'."
        )
    folder = path / "val" if (path / "val").is_dir() else path
    classes = class_folders(folder)
    indices = _class_indices(folder, [path.name for path in classes], num_classes)
    if indices is None:
        return (View(file) for file in image_paths(folder))
    return (View(file, index) for path, index in zip(classes, indices, strict=True) for file in image_paths(path))


def _csv_views(path: Path, num_classes: int) -> Iterator[View]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        missing = {"file", "class_index"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} lacks {' and '.join(sorted(missing))}; the columns in its first line are "
                f"{list(rows.fieldnames or ())}. Expected at least file,class_index."
            )
        for row in rows:
            where, text = f"{path}, line {rows.line_num}", row["class_index"] or ""
            file = path.parent / (row["file"] or "")
            if not re.fullmatch(r"\s*\d+\s*", text) or int(text) >= num_classes:
                raise ValueError(
                    f"{where}: class_index is {text!r}; expected an integer from 0 to {num_classes - 1}, the index of "
                    "the class in the pre-trained model's output."
                )
            if not file.is_file():
                raise FileNotFoundError(f"{where}: there is no file {file}. Names are relative to the CSV file.")
            yield View(file, int(text))


def _class_indices(folder: Path, names: list[str], num_classes: int) -> list[int] | None:
    """Read class indices off the folder names; None if the names say nothing."""
    if names and all(name.isdecimal() for name in names):
        indices = [int(name) for name in names]
        if max(indices) >= num_classes:
            raise ValueError(
                f"{folder}: the class folder {max(indices)} is no class index; expected 0 to {num_classes - 1}, the "
                "indices of the classes in the pre-trained model's output."
            )
        return indices
    if len(names) == num_classes:
        return list(range(num_classes))
    if names and all(re.fullmatch(r"n\d{8}", name) for name in names):
        return _imagenet_indices(folder, names, num_classes)
    return None


def _imagenet_indices(folder: Path, names: list[str], num_classes: int) -> list[int]:
    imagenet: Any = ImageNetInfo()
    order = {wnid: index for index, wnid in enumerate(imagenet.label_names())}
    unknown = [name for name in names if name not in order]
    if unknown or num_classes != len(order):
        reason = f"{unknown[:5]} are not among ImageNet-1K's" if unknown else f"the model has {num_classes} classes"
        raise ValueError(
            f"{folder}: its {len(names)} folders have ImageNet identifiers, but {reason}. Give exactly {num_classes} "
            "class folders, folders named by class index, or a CSV file with the columns file and class_index."
        )
    return [order[name] for name in names]


@lru_cache(maxsize=2)
def _read_shared(file: Path) -> Image.Image:
    """Read a picture once for its neighbouring views."""
    return read_image(file)
