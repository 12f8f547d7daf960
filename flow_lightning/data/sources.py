"""Pictures from files or arrays, each as `(PIL image, class)`, before any transform.

In: paths or pixels, and class indices. Out: a map-style data set. Next: `catalogue.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def read_image(path: str | Path) -> Image.Image:
    """Read an image file completely, as RGB, or raise an OSError that names it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise OSError(
            f"Cannot read the image file {path} ({type(error).__name__}: {error}). Replace it by an intact copy, or "
            "remove it from the data set."
        ) from error


class LabelledImages(Dataset[tuple[Image.Image, int]]):
    """Pairs of image and class index. `read` makes a PIL image of a file, or of what is in its place."""

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
        """Class index of each sample, known without reading images."""
        return [target for _, target in self.samples]

    def part(self, positions: Sequence[int]) -> "LabelledImages":
        """Return the samples at some positions, in that order."""
        return LabelledImages((self.samples[position] for position in positions), self.read)


def image_paths(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted, without hidden ones."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def class_folders(folder: Path, ignore: Sequence[str] = ()) -> list[Path]:
    """List the visible sub-folders of a folder, sorted by name: one per class."""
    visible = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in visible if path.name not in ignore)


def read_class_folders(folder: Path, ignore: Sequence[str] = ()) -> tuple[LabelledImages, list[str]]:
    """Read a folder that holds one folder of images per class, such as `folder/cat/1.jpg`: images and class names.

    A class index is the position of its name in sorted order, without `ignore`. FileNotFoundError says what is missing.
    """
    classes = {path.name: image_paths(path) for path in class_folders(folder, ignore)}
    empty = [name for name, files in classes.items() if not files]
    if empty or not classes:
        raise FileNotFoundError(
            f"{folder.resolve()} must hold one folder of images per class, such as cat/1.jpg and dog/1.jpg. It has "
            f"{f'no images in {empty[:5]}' if empty else 'no folders'} (suffixes: {', '.join(IMAGE_SUFFIXES)})."
        )
    return LabelledImages((file, k) for k, files in enumerate(classes.values()) for file in files), list(classes)
