"""Small data sets on disk in the layouts of the real ones; each class has its own colour."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.cifar
import torchvision.datasets.flowers102
from PIL import Image
from scipy.io import savemat

TRAIN, TEST = 24, 12
CLASSES = ("apple", "bike", "cat")


def accept_any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision open fake files of CIFAR and Flowers102, whose MD5 sums are not the official ones."""
    for module in (torchvision.datasets.cifar, torchvision.datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def picture(number: int, target: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Draw noise around the colour of a class; the same number gives the same picture."""
    colour = np.array([(target * 83) % 200, (target * 151 + 60) % 200, (target * 37 + 120) % 200])
    noise = np.random.default_rng(number).integers(0, 56, size=(size[1], size[0], 3))
    return Image.fromarray((colour + noise).astype(np.uint8))


def save_picture(path: Path, number: int, target: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, target).save(path)


def make_class_folders(folder: Path, per_class: int = 4, classes: tuple[str, ...] = CLASSES, start: int = 0) -> None:
    """Write `folder/<class>/<number>.png`; another start gives other pictures."""
    for target, name in enumerate(classes):
        for number in range(start, start + per_class):
            save_picture(folder / name / f"{number:03d}.png", 100 * target + number, target)


def make_folder(root: Path) -> None:
    make_class_folders(root / "train", TRAIN // 3)
    make_class_folders(root / "test", TEST // 3, start=50)


def make_cifar10(root: Path) -> None:
    parts = {f"data_batch_{batch + 1}": range(batch * 10, batch * 10 + 10) for batch in range(5)}
    parts["test_batch"] = range(50, 50 + TEST)
    _write_cifar(root / "cifar-10-batches-py", parts, "labels", "batches.meta", "label_names", 10)


def make_cifar100(root: Path) -> None:
    parts = {"train": range(50), "test": range(50, 50 + TEST)}
    _write_cifar(root / "cifar-100-python", parts, "fine_labels", "meta", "fine_label_names", 100)


def _write_cifar(folder: Path, parts: dict[str, range], key: str, meta: str, names: str, classes: int) -> None:
    folder.mkdir(parents=True)
    for name, numbers in parts.items():
        labels = [number % 10 * (classes // 10) for number in numbers]
        pixels = [np.asarray(picture(number, label, (32, 32))) for number, label in zip(numbers, labels)]
        flat = np.stack(pixels).transpose(0, 3, 1, 2).reshape(len(labels), -1)
        (folder / name).write_bytes(pickle.dumps({"data": flat, key: labels}))
    (folder / meta).write_bytes(pickle.dumps({names: [f"kind {target}" for target in range(classes)]}))


def make_flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    numbers = np.arange(1, TRAIN + TEST + 1)
    labels = (numbers % 3 + 1).astype(np.uint8)
    for number, label in zip(numbers.tolist(), labels.tolist()):
        save_picture(folder / "jpg" / f"image_{number:05d}.jpg", number, label - 1)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    valid, train, test = np.split(numbers, [TRAIN // 2, TRAIN])
    savemat(folder / "setid.mat", {"trnid": train, "valid": valid, "tstid": test})


def make_dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for offset, (part, count) in enumerate((("train", TRAIN // 2), ("val", TRAIN // 2), ("test", TEST))):
        lines = [f"{CLASSES[n % 3]}/{CLASSES[n % 3]}_{offset}{n:03d}.jpg" for n in range(count)]
        for number, line in enumerate(lines):
            save_picture(folder / "images" / line, 100 * offset + number, number % 3)
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")


def make_caltech101(root: Path) -> None:
    """Write the original folder of classes, with the one that is no class."""
    for target, name in enumerate(("BACKGROUND_Google", *CLASSES)):
        for number in range(1, 11):
            path = root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg"
            save_picture(path, 100 * target + number, target)


def make_stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    parts = ("cars_train", "devkit/cars_train_annos", TRAIN), ("cars_test", "cars_test_annos_withlabels", TEST)
    for images, annotations, count in parts:
        rows = np.zeros(count, dtype=[("class", object), ("fname", object)])
        for number in range(count):
            rows[number] = (np.uint8(number % 3 + 1), f"{number + 1:05d}.jpg")
            save_picture(folder / images / rows[number]["fname"], number + len(images), number % 3)
        savemat(folder / f"{annotations}.mat", {"annotations": rows})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(CLASSES, dtype=object)})


MAKERS: dict[str, Callable[[Path], None]] = {
    "CIFAR10": make_cifar10,
    "CIFAR100": make_cifar100,
    "Flowers102": make_flowers102,
    "DTD": make_dtd,
    "Caltech101": make_caltech101,
    "StanfordCars": make_stanford_cars,
    "StanfordDogs": lambda root: make_class_folders(root / "stanford_dogs" / "Images", per_class=10),
    "digits": lambda root: None,  # they come with scikit-learn
    "folder": make_folder,
}
