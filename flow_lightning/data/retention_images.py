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
from flow_lightning.data.transforms import Transform, normalise
from flow_lightning.quickstart.photographs import crop_boxes, packaged_photographs


class View(NamedTuple):
    """An image file, its class index if known, and the box to crop (left, upper, right, lower; in pixels)."""

    file: Path
    target: int | None = None
    box: tuple[int, int, int, int] | None = None


class RetentionImages(Dataset[dict[str, Any]]):
    """Images as `{"image": float [3, H, W], "index": int}`, with "target" if the first view has one."""

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


_read_shared = lru_cache(maxsize=2)(read_image)  # once for the neighbouring views of a picture


def retention_images(
    path: str | Path,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    num_classes: int = 1000,
) -> RetentionImages:
    """Open the images on which retention is measured, prepared as the pre-trained model expects them.

    `path` is one of these.

    - a folder of class folders, as ImageNet's validation set. Their names are class indices ("0", "1", ...) or ImageNet
      identifiers ("n01440764": any part of ImageNet-1K). Of exactly `num_classes` folders with other names the sorted
      order gives the index. A folder `val` inside is taken instead.
    - a CSV file with the columns `file` (relative to the CSV) and `class_index`.
    - any other folder: all images below it, without labels.
    - the word "packaged": 513 views of 27 photographs that come with scikit-image, scikit-learn and foolbox,
      without labels.

    The shorter side is resized to `image_size / crop_pct` pixels, and the centre cropped to `image_size`. `mean` and
    `std` of each channel are of pixels in `[0, 1]`. The pre-trained head has `num_classes`.

    Raises:
        FileNotFoundError: If there is no such path, or no image in it.
        ValueError: If labels cannot be read.
    """
    views = list(_packaged_views() if str(path) == "packaged" else _find_views(Path(path), num_classes))
    if not views:
        raise FileNotFoundError(
            f"Retention images: no image files in {Path(path).resolve()} (looked for {', '.join(IMAGE_SUFFIXES)})."
        )
    resize = v2.Resize(round(image_size / crop_pct), v2.InterpolationMode(interpolation))
    return RetentionImages(
        views, v2.Compose([resize, v2.CenterCrop(image_size), v2.PILToTensor(), *normalise(mean, std)])
    )


def _packaged_views() -> Iterator[View]:
    for file in packaged_photographs():
        yield View(file)
        with Image.open(file) as image:
            yield from (View(file, box=box) for box in crop_boxes(*image.size))


def _find_views(path: Path, num_classes: int) -> Iterator[View]:
    if path.is_file() and path.suffix.lower() == ".csv":
        return _csv_views(path, num_classes)
    if not path.is_dir():
        raise FileNotFoundError(
            f"Retention images: {path.resolve()} is no folder and no .csv file. 'packaged' stands for packaged images."
        )
    folder = path / "val" if (path / "val").is_dir() else path
    classes = class_folders(folder)
    indices = _class_indices(folder, [path.name for path in classes], num_classes)
    if indices is None:
        return (View(file) for file in image_paths(folder))
    return (View(file, index) for path, index in zip(classes, indices) for file in image_paths(path))


def _csv_views(path: Path, num_classes: int) -> Iterator[View]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            file, label = row.get("file"), row.get("class_index") or ""
            if not file or not re.fullmatch(r"\s*\d+\s*", label) or int(label) >= num_classes:
                raise ValueError(
                    f"{path}, line {rows.line_num}: file is {file!r} and class_index {label!r}. Expected a path "
                    f"relative to the CSV file, and an index from 0 to {num_classes - 1} in the pre-trained output."
                )
            yield View(path.parent / file, int(label))


def _class_indices(folder: Path, names: list[str], num_classes: int) -> list[int] | None:
    """Read class indices off the folder names; None if the names say nothing."""
    if all(name.isdecimal() for name in names):
        known = {name: int(name) for name in names if int(name) < num_classes}
    elif len(names) == num_classes:
        known = {name: index for index, name in enumerate(names)}
    elif all(re.fullmatch(r"n\d{8}", name) for name in names):
        imagenet: Any = ImageNetInfo()
        known = {name: index for index, name in enumerate(imagenet.label_names()) if num_classes == 1000}
    else:
        return None
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{folder}: {unknown[:5]} are none of the {num_classes} classes of the pre-training task. Name the folders "
            f"0 to {num_classes - 1} or by ImageNet-1K's identifiers, or give exactly {num_classes} of them."
        )
    return [known[name] for name in names] or None
