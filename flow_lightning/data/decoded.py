"""Decoded images in a file that the user names: decoded and resized once, then mapped into memory by all processes.

In: training and test images, a size, a file. Out: the same images, read from the file. Next: `images.py`.
The file is `.npy`, uint8 `[n, size, size, 3]`, the test images last. A line of JSON behind the pixels says what it was
made from. Deleting the file is all that it takes to be rid of it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from flow_lightning.data.sources import LabelledImages
from flow_lightning.files import alone, save_pixels

_FORMAT = "flow_lightning decoded images 1"
_CHECKED, _BATCH = 8, 64
#: Why a file is made anew, by the entry of its last line that has changed.
_REASONS = {
    "settings": "it was made with other settings",
    "names": "it was made from other images",
    "contents": "images have changed since (their sizes or times)",
}


class DecodedImages:
    """Read rows of a file of decoded images as PIL images; each process maps the file for itself."""

    def __init__(self, file: Path, origin: dict[str, str]) -> None:
        self.file, self.origin = file, origin
        self._pixels: Any = None

    def __call__(self, row: int) -> Image.Image:
        """Return an image, or raise an OSError if another program has replaced the file."""
        if self._pixels is None:
            self._pixels, origin = _open(self.file)
            if origin != self.origin:
                raise OSError(f"{self.file} was made anew for other images or settings. Give each its own file.")
        return Image.fromarray(self._pixels[row])

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "origin": self.origin, "_pixels": None}

    def of(self, images: LabelledImages, first: int = 0) -> LabelledImages:
        """Return images with their classes, read from the row `first` on."""
        return LabelledImages(enumerate(images.targets, first), self)


def decode(
    parts: Sequence[LabelledImages], file: str | Path, size: int, interpolation: str, root: Path, workers: int = 0
) -> DecodedImages:
    """Make a file of decoded images if there is none that is still true; say why an older one is not.

    Still true means: the same settings, names, sizes and times of files, and a few images, decoded anew, are equal.
    One process makes the file, others that want it wait. Killed, it leaves no file, or the one before.

    Args:
        parts: Images, in the order of the file's rows.
        file: A name that ends in `.npy`.
        size: Height and width, in pixels.
        interpolation: How images are resized.
        root: What the names of image files are relative to, so that all may be moved.
        workers: Loader processes that decode.

    Raises:
        OSError: If there is too little space, or an image cannot be read.
        ValueError: If the name does not end in `.npy`, or the file is something else, which is then left as it is.
    """
    file, images = Path(file), [image for part in parts for image, _ in part.samples]
    source = _Resized(images, parts[0].read, size, v2.InterpolationMode(interpolation))
    if file.suffix != ".npy":
        raise ValueError(f"The file of decoded images is {file}. Give it a name that ends in .npy.")
    settings = f"{size} pixels, {interpolation}, Pillow {PIL.__version__}"
    origin = {"format": _FORMAT, "settings": settings, **_fingerprints(images, root)}
    if _why_not(file, origin, source) is not None:
        with alone(file):
            if (reason := _why_not(file, origin, source)) is not None:  # another process may have made it by now
                _make(file, origin, source, reason, workers)
    return DecodedImages(file, origin)


class _Resized(Dataset[np.ndarray]):
    """Images as uint8 `[size, size, 3]`."""

    def __init__(
        self, images: Sequence[Any], read: Callable[[Any], Image.Image], size: int, mode: v2.InterpolationMode
    ) -> None:
        self.images, self.read, self.size, self.resize = images, read, size, v2.Resize((size, size), mode)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> np.ndarray:
        return np.array(self.resize(self.read(self.images[position])))


def _make(file: Path, origin: dict[str, str], source: _Resized, reason: str, workers: int) -> None:
    shape = (len(source), source.size, source.size, 3)
    needed, free = float(np.prod(shape)), shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(
            f"{file} needs {needed / 1e9:.2f} GB for {len(source)} images, but {free / 1e9:.2f} GB are free there. "
            "Name a file elsewhere, or leave the option out."
        )
    rank_zero_info(f"Decoding {len(source)} images into {file} ({needed / 1e9:.2f} GB): {reason}.")

    def batches() -> Iterator[bytes]:
        with tqdm(total=len(source), desc="Decoding", unit=" images") as progress:
            for batch in DataLoader(source, _BATCH, num_workers=workers):
                yield batch.numpy().tobytes()
                progress.update(len(batch))

    save_pixels(file, shape, batches(), json.dumps(origin))


def _why_not(file: Path, origin: dict[str, str], source: _Resized) -> str | None:
    """Say why a file is not what is wanted, or return None if it is."""
    if not file.exists():
        return "there is no such file yet"
    pixels, found = _open(file)
    for name, reason in _REASONS.items():
        if found[name] != origin[name]:
            return f"{reason} ({found[name]})" if name == "settings" else reason
    for position in sorted({i * (len(source) - 1) // (_CHECKED - 1) for i in range(_CHECKED)}):
        if not np.array_equal(pixels[position], source[position]):
            return f"image {position} decodes to other pixels now"
    return None


def _open(file: Path) -> tuple[Any, dict[str, str]]:
    """Map the pixels of a file, and read what it was made from."""
    try:
        pixels = np.load(file, mmap_mode="r")
        with open(file, "rb") as content:
            content.seek(pixels.offset + pixels.nbytes)
            found = json.load(content)
        if found["format"] == _FORMAT:
            return pixels, found
    except (ValueError, EOFError, AttributeError, KeyError, TypeError):  # no array, too short, no JSON, or another
        pass
    raise ValueError(f"{file} is no whole file of decoded images. Delete it, or give another name.")


def _fingerprints(images: Sequence[Any], root: Path) -> dict[str, str]:
    """Hash names and contents of images: of files path, size and time, of arrays shape and bytes."""
    names, contents = (hashlib.blake2b(digest_size=16) for _ in range(2))
    for image in images:
        if isinstance(image, np.ndarray):
            names.update(repr(image.shape).encode())
            contents.update(image.tobytes())
        else:
            state = os.stat(image)
            names.update(os.path.relpath(image, root).encode() + b"\0")
            contents.update(f"{state.st_size} {state.st_mtime_ns};".encode())
    return {"names": names.hexdigest(), "contents": contents.hexdigest()}
