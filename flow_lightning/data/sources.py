"""Pictures from files or arrays, each as `(PIL image, class)`, before any transform.

In: paths or pixels, and class indices. Out: a map-style data set. Next: `catalogue.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, Subset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class UnreadableImageError(OSError):
    """An image file that cannot be decoded. The message names the file."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file completely, as RGB.

    Raises:
        UnreadableImageError: If the file is absent, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise UnreadableImageError(
            f"Cannot read the image file {path} ({type(error).__name__}: {error}). Replace it by an intact copy, or "
            "remove it from the data set."
        ) from error


class LabelledImages(Dataset[tuple[Image.Image, int]]):
    """Pairs of image, by default a file, and class index; `read` makes a PIL image of it when it is asked for."""

    def __init__(self, samples: Iterable[tuple[Any, int]], read: Callable[[Any], Image.Image] = read_image) -> None:
        self.samples = [(image, int(target)) for image, target in samples]
        self.read = read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        image, target = self.samples[position]
        return self.read(image), target

    @property
    def targets(self) -> list[int]:
        """Class index of each sample."""
        return [target for _, target in self.samples]


def targets_of(dataset: Any) -> list[int] | None:
    """Return the class index of every sample, or None if the images would have to be read for it."""
    if isinstance(dataset, Subset):
        inner = targets_of(dataset.dataset)
        return None if inner is None else [inner[position] for position in dataset.indices]
    targets = getattr(dataset, "targets", None)
    return None if targets is None else [int(target) for target in targets]


def image_paths(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted, without hidden ones."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def class_folders(folder: Path, ignore: Sequence[str] = ()) -> list[Path]:
    """List the visible sub-folders of a folder, sorted by name: one per class."""
    visible = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in visible if path.name not in ignore)


def read_class_folders(folder: Path, ignore: Sequence[str] = ()) -> tuple[LabelledImages, list[str]]:
    """Read a folder that holds one folder of images per class: `folder/cat/1.jpg`.

    Returns:
        The images and the class names. A class index is the position of its name in sorted order, without `ignore`.

    Raises:
        FileNotFoundError: If there is no class folder, or a class folder without images.
    """
    classes = class_folders(folder, ignore)
    if not classes:
        raise FileNotFoundError(
            f"{folder.resolve()} holds no class folders. Make one folder of images per class, for example "
            f"{folder.name}/cat/1.jpg and {folder.name}/dog/1.jpg."
        )
    samples = [(path, target) for target, name in enumerate(classes) for path in image_paths(name)]
    empty = sorted(set(range(len(classes))) - {target for _, target in samples})
    if empty:
        raise FileNotFoundError(
            f"No image files in {len(empty)} class folders: {', '.join(str(classes[k]) for k in empty[:5])} "
            f"(suffixes: {', '.join(IMAGE_SUFFIXES)}). Add images or remove the folder."
        )
    return LabelledImages(samples), [path.name for path in classes]
