import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits

from flow_lightning.data.catalogue import CATALOGUE, Splits, find_dataset
from flow_lightning.data.sources import targets_of
from tests.data.fake_datasets import (
    CLASSES,
    MAKERS,
    TEST,
    TRAIN,
    accept_any_checksum,
    make_class_folders,
    make_folder,
)


def build(name: str, root: Path, seed: int = 42) -> Splits:
    return CATALOGUE[name].build(root, False, seed)


def content(dataset: Any) -> list[tuple[bytes, int]]:
    """Pixels and class of every sample."""
    samples = (dataset[position] for position in range(len(dataset)))
    return [(image.convert("RGB").tobytes(), int(target)) for image, target in samples]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_gives_pictures_with_their_classes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_any_checksum(monkeypatch)
    MAKERS[name](tmp_path)
    splits = build(name, tmp_path)
    for part in (splits.train, splits.test):
        pictures: Any = part
        targets = targets_of(part)
        assert targets is not None and 0 <= min(targets) <= max(targets) < len(splits.class_names)
        image, target = pictures[len(targets) - 1]
        assert isinstance(image, Image.Image) and image.mode == "RGB" and target == targets[-1]
    assert not set(content(splits.train)) & set(content(splits.test))


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        *[(name, [{"train": True}], {"train": False}) for name in ("CIFAR10", "CIFAR100")],
        *[(name, [{"split": "train"}, {"split": "val"}], {"split": "test"}) for name in ("Flowers102", "DTD")],
        ("StanfordCars", [{"split": "train"}], {"split": "test"}),
    ],
)
def test_official_splits_are_what_torchvision_reads(
    name: str, train: list[Any], test: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_any_checksum(monkeypatch)
    MAKERS[name](tmp_path)
    splits, reference = build(name, tmp_path), getattr(torchvision.datasets, name)
    assert content(splits.train) == [sample for part in train for sample in content(reference(tmp_path, **part))]
    assert content(splits.test) == content(reference(tmp_path, **test))
    assert splits.class_names == list(reference(tmp_path, **test).classes)
    assert not name.startswith("CIFAR") or len(splits.class_names) == CATALOGUE[name].num_classes


def test_caltech101_splits_what_torchvision_reads(tmp_path: Path) -> None:
    MAKERS["Caltech101"](tmp_path)
    splits, reference = build("Caltech101", tmp_path), torchvision.datasets.Caltech101(tmp_path)
    assert Counter(content(splits.train) + content(splits.test)) == Counter(content(reference))
    assert (len(content(splits.train)), splits.class_names) == (24, reference.categories)


@pytest.mark.parametrize(("name", "folder"), [("Caltech101", "caltech101"), ("StanfordCars", "stanford_cars")])
def test_train_and_test_folders_are_taken_as_they_are(name: str, folder: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)  # the original layout is there as well: the folders win
    make_folder(tmp_path / folder)
    splits = build(name, tmp_path)
    assert (len(content(splits.train)), len(content(splits.test))) == (TRAIN, TEST)
    assert splits.class_names == list(CLASSES)


def test_stanford_dogs_is_split_80_to_20_by_the_seed(tmp_path: Path) -> None:
    MAKERS["StanfordDogs"](tmp_path)
    parts = [
        [content(part) for part in (splits.train, splits.test)]
        for splits in (build("StanfordDogs", tmp_path, seed) for seed in (1, 1, 2))
    ]
    assert [len(part) for part in parts[0]] == [24, 6]
    assert len(set(parts[0][0] + parts[0][1])) == 30
    assert parts[0] == parts[1] != parts[2]


def test_digits_are_all_there_once(tmp_path: Path) -> None:
    splits, reference = build("digits", tmp_path), load_digits()
    assert (len(content(splits.train)), len(content(splits.test))) == (1198, 599)
    grey = np.round(reference.images * 255 / 16).astype(np.uint8)
    expected = Counter(
        (np.stack([image] * 3, axis=-1).tobytes(), int(target))
        for image, target in zip(grey, reference.target, strict=True)
    )
    assert Counter(content(splits.train) + content(splits.test)) == expected


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("Flowers102", "scipy.io")])
def test_a_missing_package_is_named_with_the_pip_line(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MAKERS[name](tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"'{module[:5]}.*data set {name} .*pip install \"flow-lightning\[quickstart\]\""
    with pytest.raises(ImportError, match=message):
        build(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "place", "advice"),
    [
        ("CIFAR10", "cifar-10-batches-py", "download=True"),
        ("CIFAR100", "cifar-100-python", "download=True"),
        ("Flowers102", "flowers-102/jpg", "download=True"),
        ("DTD", "dtd/dtd/images", "download=True"),
        ("Caltech101", "caltech101/101_ObjectCategories", "download=True.*train/<class>"),
        ("StanfordCars", "stanford_cars/devkit/cars_meta.mat", "no longer offers.*train/<class>"),
        ("StanfordDogs", "stanford_dogs/Images", "vision.stanford.edu.*<breed>"),
        ("folder", "train", "train/<class>"),
    ],
)
def test_missing_data_says_where_it_must_be_and_how_to_get_it(
    name: str, place: str, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=f"needs {tmp_path / place}, which does not exist.*{advice}"):
        build(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "Flowers102"])
def test_damaged_official_files_are_refused(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)  # with contents whose checksums are not the official ones
    with pytest.raises(FileNotFoundError, match=r"incomplete or damaged.*fetch them again"):
        build(name, tmp_path)


def test_folder_takes_val_where_there_is_no_test_and_differing_classes_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    shutil.move(tmp_path / "test", tmp_path / "val")
    assert len(content(build("folder", tmp_path).test)) == TEST
    make_class_folders(tmp_path / "val", 1, (*CLASSES, "dog"))
    shutil.rmtree(tmp_path / "val" / "bike")
    with pytest.raises(ValueError, match=r"only the first has \['bike'\], only the second \['dog'\]"):
        build("folder", tmp_path)


@pytest.mark.parametrize("spelling", ["cifar10", "CIFAR-10", "stanford_dogs", "StanfordDogs", "dtd"])
def test_spelling_of_names_does_not_matter(spelling: str) -> None:
    assert find_dataset(spelling) in CATALOGUE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StanfordCar", r"Unknown data set 'StanfordCar'. Did you mean StanfordCars"),
        ("zzz", r"Unknown data set 'zzz'. Known are CIFAR10, .*<root>/train/<class>"),
    ],
)
def test_an_unknown_name_gives_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_dataset(name)
