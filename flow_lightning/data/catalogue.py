"""The data sets by name. `CATALOGUE`, at the end, is the whole list.

To add one, write a function `build(root, download, split_seed) -> Splits` and enter it there. Training and
test set are map-style data sets of `(PIL image, class index)`; nothing else is asked of them.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision.datasets
from torch.utils.data import Dataset, Subset

from flow_lightning.data.sources import ImageArrays, ImageFiles, read_class_folders, split_positions
from flow_lightning.data.transforms import RecipeName


class Splits(NamedTuple):
    """Training set, test set and the class names in the order of their indices."""

    train: Dataset[Any]
    test: Dataset[Any]
    class_names: list[str]


@dataclass(frozen=True)
class CatalogueEntry:
    """How a data set is built, the paper's transforms for it, its number of classes where that is fixed."""

    build: Callable[[Path, bool, int], Splits]
    transforms: RecipeName
    num_classes: int | None


def find_dataset(name: str) -> str:
    """Return the catalogue's spelling of a data set name; case, `_` and `-` do not matter.

    Raises:
        ValueError: If there is no such data set; the message gives the nearest names.

    Example:
        >>> find_dataset("stanford_cars")
        'StanfordCars'
    """
    spellings = {known.lower(): known for known in CATALOGUE}
    plain = name.lower().replace("_", "").replace("-", "")
    if plain in spellings:
        return spellings[plain]
    near = [spellings[match] for match in difflib.get_close_matches(plain, spellings, n=3, cutoff=0.4)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"Unknown data set {name!r}.{hint} Known are {', '.join(CATALOGUE)}; 'folder' takes any images that "
        "lie in <root>/train/<class>/ and <root>/test/<class>/."
    )


def _cifar(torchvision_class: Any, root: Path, download: bool, split_seed: int) -> Splits:
    """Read the official training and test images into memory."""
    folder = root / torchvision_class.base_folder
    if not download:
        _require(folder, torchvision_class.__name__, _DOWNLOAD)
    try:
        train, test = (torchvision_class(root, train=part, download=download) for part in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"The files of {torchvision_class.__name__} in {folder.resolve()} are incomplete or damaged "
            f"({error}). Remove the folder and fetch it again with download=True (--data.download true)."
        ) from error
    train_images, test_images = (ImageArrays(part.data, part.targets) for part in (train, test))
    return Splits(train_images, test_images, list(train.classes))


def _flowers102(root: Path, download: bool, split_seed: int) -> Splits:
    """Join the official training and validation images; take the official test images."""
    folder = root / "flowers-102"
    if download:
        torchvision.datasets.Flowers102(root, download=True)
    for part in ("jpg", "imagelabels.mat", "setid.mat"):
        _require(folder / part, "Flowers102", _DOWNLOAD)
    labels = _read_mat(folder / "imagelabels.mat", "Flowers102")["labels"]
    sets = _read_mat(folder / "setid.mat", "Flowers102")

    def files(*keys: str) -> ImageFiles:
        numbers = [int(number) for key in keys for number in np.atleast_1d(sets[key])]
        return ImageFiles((folder / "jpg" / f"image_{k:05d}.jpg", labels[k - 1] - 1) for k in numbers)

    names = getattr(torchvision.datasets.Flowers102, "classes", [f"flower {k}" for k in range(1, 103)])
    return Splits(files("trnid", "valid"), files("tstid"), list(names))


def _dtd(root: Path, download: bool, split_seed: int) -> Splits:
    """Join training and validation images of the first official partition; take its test images."""
    folder = root / "dtd" / "dtd"
    if download:
        torchvision.datasets.DTD(root, download=True)
    for part in ("images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"):
        _require(folder / part, "DTD", _DOWNLOAD)
    lists = {part: (folder / f"labels/{part}1.txt").read_text().split() for part in ("train", "val", "test")}
    names = sorted({line.split("/")[0] for lines in lists.values() for line in lines})

    def files(lines: list[str]) -> ImageFiles:
        return ImageFiles((folder / "images" / line, names.index(line.split("/")[0])) for line in lines)

    return Splits(files(lists["train"] + lists["val"]), files(lists["test"]), names)


def _caltech101(root: Path, download: bool, split_seed: int) -> Splits:
    """Read train and test folders, as the paper; else split the 101 class folders 80/20 at random."""
    folder, no_class = root / "caltech101", ("BACKGROUND_Google",)
    if (folder / "train").is_dir():
        return _train_test_folders(folder, no_class)
    if download:
        torchvision.datasets.Caltech101(root, download=True)
    images = folder / "101_ObjectCategories"
    _require(images, "Caltech101", f"{_DOWNLOAD} Or split it into {folder}/train/<class>/ and test/<class>/.")
    return _random_split(images, split_seed, no_class)


def _stanford_cars(root: Path, download: bool, split_seed: int) -> Splits:
    """Read train and test folders, as the paper; else the official files (devkit, cars_train, cars_test)."""
    folder = root / "stanford_cars"
    if (folder / "train").is_dir():
        return _train_test_folders(folder)
    lists = {"cars_train": "devkit/cars_train_annos.mat", "cars_test": "cars_test_annos_withlabels.mat"}
    for part in ("devkit/cars_meta.mat", *lists, *lists.values()):
        _require(
            folder / part,
            "StanfordCars",
            "Its official page (ai.stanford.edu/~jkrause/cars) no longer offers the files, so download does "
            f"not help. Put a copy into {folder}: train/<class>/ and test/<class>/ folders, or cars_train/, "
            "cars_test/, cars_test_annos_withlabels.mat and devkit/.",
        )

    def files(images: str) -> ImageFiles:
        annotations = np.atleast_1d(_read_mat(folder / lists[images], "StanfordCars")["annotations"])
        return ImageFiles((folder / images / str(row["fname"]), int(row["class"]) - 1) for row in annotations)

    names = _read_mat(folder / "devkit" / "cars_meta.mat", "StanfordCars")["class_names"]
    return Splits(files("cars_train"), files("cars_test"), [str(name) for name in np.atleast_1d(names)])


def _stanford_dogs(root: Path, download: bool, split_seed: int) -> Splits:
    """Split all images 80/20 at random, as in the paper."""
    images = root / "stanford_dogs" / "Images"
    how = "Unpack images.tar from the Stanford Dogs page (vision.stanford.edu/aditya86/ImageNetDogs) there: "
    _require(images, "StanfordDogs", f"{how}{images}/<breed>/*.jpg.")
    return _random_split(images, split_seed)


def _digits(root: Path, download: bool, split_seed: int) -> Splits:
    """Split scikit-learn's 1,797 handwritten digits (8x8 pixels): two thirds to train, one third to test."""
    pictures = _import("sklearn.datasets", "scikit-learn", "digits").load_digits()
    grey = np.round(pictures.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    first, second = (np.array(part) for part in split_positions(len(pixels), 2 / 3, split_seed))
    train, test = (ImageArrays(pixels[part], pictures.target[part]) for part in (first, second))
    return Splits(train, test, [str(name) for name in pictures.target_names])


def _folder(root: Path, download: bool, split_seed: int) -> Splits:
    """Read images of the user's own: `root/train/<class>/` and `root/test/<class>/` (or `val`)."""
    return _train_test_folders(root)


def _train_test_folders(folder: Path, ignore: tuple[str, ...] = ()) -> Splits:
    layout = f"Expected images in {folder}/train/<class>/ and {folder}/test/<class>/ (or val/<class>/)."
    val_instead = (folder / "val").is_dir() and not (folder / "test").is_dir()
    train_folder, test_folder = folder / "train", folder / ("val" if val_instead else "test")
    for part in (train_folder, test_folder):
        _require(part, "image folder", layout)
    train, train_names = read_class_folders(train_folder, ignore)
    test, test_names = read_class_folders(test_folder, ignore)
    if train_names != test_names:
        only_train = sorted(set(train_names) - set(test_names))
        only_test = sorted(set(test_names) - set(train_names))
        raise ValueError(
            f"The class folders of {train_folder} and {test_folder} differ: only the first has "
            f"{only_train[:10]}, only the second {only_test[:10]}. Class indices come from the sorted names: "
            "both need the same folders."
        )
    return Splits(train, test, train_names)


def _random_split(images: Path, split_seed: int, ignore: tuple[str, ...] = ()) -> Splits:
    files, names = read_class_folders(images, ignore)
    train, test = (Subset(files, part) for part in split_positions(len(files), 0.8, split_seed))
    return Splits(train, test, names)


def _require(path: Path, dataset: str, how: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{dataset}: looked for {path.resolve()}, which does not exist. {how}")


def _read_mat(path: Path, dataset: str) -> Any:
    return _import("scipy.io", "scipy", dataset).loadmat(path, squeeze_me=True)


def _import(module: str, package: str, dataset: str) -> Any:
    if find_spec(module.partition(".")[0]) is None:
        raise ModuleNotFoundError(
            f"The data set {dataset!r} needs {package}, which is not installed: "
            f"pip install 'flow-lightning[quickstart]' (or: pip install {package}).",
            name=module,
        )
    return import_module(module)


_DOWNLOAD = "Fetch it with download=True (--data.download true), or set root (--data.root) to the folder that has it."

CATALOGUE: dict[str, CatalogueEntry] = {
    "CIFAR10": CatalogueEntry(partial(_cifar, torchvision.datasets.CIFAR10), "resize_flip", 10),
    "CIFAR100": CatalogueEntry(partial(_cifar, torchvision.datasets.CIFAR100), "resize_flip", 100),
    "Flowers102": CatalogueEntry(_flowers102, "resize_flip", 102),
    "DTD": CatalogueEntry(_dtd, "resize_flip", 47),
    "Caltech101": CatalogueEntry(_caltech101, "random_resized_crop", 101),
    "StanfordCars": CatalogueEntry(_stanford_cars, "crop_jitter", 196),
    "StanfordDogs": CatalogueEntry(_stanford_dogs, "crop_jitter", 120),
    "digits": CatalogueEntry(_digits, "none", 10),
    "folder": CatalogueEntry(_folder, "resize_flip", None),
}
