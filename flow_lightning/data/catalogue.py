"""The data sets by name. `CATALOGUE`, at the end, lists them all.

In: the folder of the files. Out: training and test set, map-style, of `(PIL image, class index)`. Next: `images.py`.
To add a data set, write a function `build(root, download, split_seed) -> Splits` and enter it at the end.
"""

import difflib
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

from flow_lightning.data.samplers import split_positions
from flow_lightning.data.sources import LabelledImages, read_class_folders
from flow_lightning.data.transforms import RecipeName
from flow_lightning.optional import optional_import

_DOWNLOAD = "Fetch it with download=True (--data.download true), or set root (--data.root) to the folder that has it."


class Splits(NamedTuple):
    """Training set, test set and the class names in the order of their indices."""

    train: LabelledImages
    test: LabelledImages
    class_names: list[str]


class CatalogueEntry(NamedTuple):
    """How a data set is built, the paper's transforms for it, and its number of classes if that is fixed."""

    build: Callable[[Path, bool, int], Splits]
    transforms: RecipeName
    num_classes: int | None


def find_dataset(name: str) -> str:
    """Return the catalogue's spelling of a data set name, or raise ValueError. Case, `_` and `-` do not matter."""
    spellings = {known.lower(): known for known in CATALOGUE}
    plain = name.lower().replace("_", "").replace("-", "")
    if plain in spellings:
        return spellings[plain]
    near = difflib.get_close_matches(plain, spellings, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(spellings[match] for match in near)}?" if near else ""
    raise ValueError(
        f"Unknown data set {name!r}.{hint} Known are {', '.join(CATALOGUE)}. 'folder' takes your own images from "
        "<root>/train/<class>/ and <root>/test/<class>/."
    )


def _official(name: str, folder: str, root: Path, download: bool, split_seed: int = 0, how: str = _DOWNLOAD) -> Splits:
    """Take the official splits, as torchvision reads them. The validation images are for training."""
    if not download:
        _require(root / folder, name, how)
    if name in ("Flowers102", "StanfordCars"):
        optional_import("scipy.io", "quickstart", f"the data set {name}")
    open_part = partial(getattr(datasets, name), root, download=download)
    try:
        if name.startswith("CIFAR"):  # its images are in memory
            parts = [open_part(train=True), open_part(train=False)]
            train, test = (LabelledImages(zip(part.data, part.targets), Image.fromarray) for part in parts)
            return Splits(train, test, list(parts[0].classes))
        # torchvision hands each path to the loader. This one returns it, so that no image is read here.
        splits = ("train", "test") if name == "StanfordCars" else ("train", "val", "test")
        parts = [open_part(split=split, loader=str) for split in splits]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"The files of {name} in {root.resolve()} are incomplete or damaged ({error}). Remove {folder}. {how}"
        ) from error
    samples = [[part[position] for position in range(len(part))] for part in parts]
    return Splits(LabelledImages(chain(*samples[:-1])), LabelledImages(samples[-1]), list(parts[0].classes))


def _caltech101(root: Path, download: bool, split_seed: int) -> Splits:
    """Read train and test folders, as the paper does, or else split the 101 class folders 80/20 at random."""
    folder, no_class = root / "caltech101", ("BACKGROUND_Google",)
    if (folder / "train").is_dir():
        return _train_test_folders(folder, ignore=no_class)
    if download:
        datasets.Caltech101(root, download=True)
    how = f"{_DOWNLOAD} Or split it into {folder}/train/<class>/ and test/<class>/."
    return _random_split(folder / "101_ObjectCategories", "Caltech101", how, split_seed, no_class)


def _stanford_cars(root: Path, download: bool, split_seed: int) -> Splits:
    """Read train and test folders, as the paper does, or else the official files."""
    folder = root / "stanford_cars"
    if (folder / "train").is_dir():
        return _train_test_folders(folder)
    how = (
        "Its official page (ai.stanford.edu/~jkrause/cars) no longer offers the files, so download does not help. "
        f"Put a copy into {folder}: train/<class>/ and test/<class>/ folders, or cars_train/, cars_test/, "
        "cars_test_annos_withlabels.mat and devkit/."
    )
    return _official("StanfordCars", folder.name, root, False, how=how)


def _stanford_dogs(root: Path, download: bool, split_seed: int) -> Splits:
    """Split all images 80/20 at random, as in the paper."""
    images = root / "stanford_dogs" / "Images"
    how = "Unpack images.tar from the Stanford Dogs page (vision.stanford.edu/aditya86/ImageNetDogs) there: "
    return _random_split(images, "StanfordDogs", f"{how}{images}/<breed>/*.jpg.", split_seed)


def _digits(root: Path, download: bool, split_seed: int) -> Splits:
    """Split scikit-learn's 1,797 handwritten digits (8x8 pixels): two thirds to train, one third to test."""
    pictures = optional_import("sklearn.datasets", "quickstart", "the data set digits").load_digits()
    pixels = np.round(pictures.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=-1)
    train, test = (
        LabelledImages(zip(pixels[part], pictures.target[part]), Image.fromarray)
        for part in split_positions(len(pixels), 2 / 3, split_seed)
    )
    return Splits(train, test, [str(name) for name in pictures.target_names])


def _train_test_folders(
    folder: Path, download: bool = False, split_seed: int = 0, ignore: tuple[str, ...] = ()
) -> Splits:
    """Read `folder/train/<class>/` and `folder/test/<class>/` (or `val`)."""
    val_instead = (folder / "val").is_dir() and not (folder / "test").is_dir()
    parts = folder / "train", folder / ("val" if val_instead else "test")
    for part in parts:
        layout = f"Put images into {folder}/train/<class>/ and {folder}/test/<class>/ (or val/<class>/)."
        _require(part, "image folder", layout)
    (train, train_names), (test, test_names) = (read_class_folders(part, ignore) for part in parts)
    if train_names != test_names:
        only_train, only_test = sorted({*train_names} - {*test_names}), sorted({*test_names} - {*train_names})
        raise ValueError(
            f"The class folders of {parts[0]} and {parts[1]} differ: only the first has {only_train[:10]}, only the "
            f"second {only_test[:10]}. Give both the same folders: class indices come from the sorted names."
        )
    return Splits(train, test, train_names)


def _random_split(images: Path, name: str, how: str, split_seed: int, ignore: tuple[str, ...] = ()) -> Splits:
    _require(images, name, how)
    files, names = read_class_folders(images, ignore)
    train, test = (files.part(positions) for positions in split_positions(len(files), 0.8, split_seed))
    return Splits(train, test, names)


def _require(path: Path, dataset: str, how: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{dataset} needs {path.resolve()}, which does not exist. {how}")


CATALOGUE: dict[str, CatalogueEntry] = {
    "CIFAR10": CatalogueEntry(partial(_official, "CIFAR10", "cifar-10-batches-py"), "resize_flip", 10),
    "CIFAR100": CatalogueEntry(partial(_official, "CIFAR100", "cifar-100-python"), "resize_flip", 100),
    "Flowers102": CatalogueEntry(partial(_official, "Flowers102", "flowers-102"), "resize_flip", 102),
    "DTD": CatalogueEntry(partial(_official, "DTD", "dtd/dtd"), "resize_flip", 47),
    "Caltech101": CatalogueEntry(_caltech101, "random_resized_crop", 101),
    "StanfordCars": CatalogueEntry(_stanford_cars, "crop_jitter", 196),
    "StanfordDogs": CatalogueEntry(_stanford_dogs, "crop_jitter", 120),
    "digits": CatalogueEntry(_digits, "none", 10),
    "folder": CatalogueEntry(_train_test_folders, "resize_flip", None),
}
