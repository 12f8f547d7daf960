import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits

from flow_lightning.data.catalogue import CATALOGUE, find_dataset
from flow_lightning.data.sources import read_image
from tests.data.fake_datasets import CLASSES, MAKERS, TEST, TRAIN, accept_any_checksum, make_class_folders, make_folder


def build(name, root, seed=42):
    return CATALOGUE[name].build(root, False, seed)


def content(dataset):
    """Pixels and class of every sample."""
    samples = (dataset[position] for position in range(len(dataset)))
    return [(image.convert("RGB").tobytes(), int(target)) for image, target in samples]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_gives_pictures_with_their_classes(name, tmp_path, monkeypatch):
    accept_any_checksum(monkeypatch)
    MAKERS[name](tmp_path)
    train, test, class_names = build(name, tmp_path)
    for part in (train, test):
        assert 0 <= min(part.targets) <= max(part.targets) < len(class_names)
        image, target = part[len(part) - 1]
        assert isinstance(image, Image.Image) and image.mode == "RGB" and target == part.targets[-1]
        in_memory = name in ("CIFAR10", "CIFAR100", "digits")
        assert part.read is (Image.fromarray if in_memory else read_image), "which names an unreadable file"
    assert not set(content(train)) & set(content(test))


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        *[(name, [{"train": True}], {"train": False}) for name in ("CIFAR10", "CIFAR100")],
        *[(name, [{"split": "train"}, {"split": "val"}], {"split": "test"}) for name in ("Flowers102", "DTD")],
        ("StanfordCars", [{"split": "train"}], {"split": "test"}),
    ],
)
def test_official_splits_are_what_torchvision_reads(name, train, test, tmp_path, monkeypatch):
    accept_any_checksum(monkeypatch)
    MAKERS[name](tmp_path)
    splits, reference = build(name, tmp_path), getattr(torchvision.datasets, name)
    assert content(splits.train) == [sample for part in train for sample in content(reference(tmp_path, **part))]
    assert content(splits.test) == content(reference(tmp_path, **test))
    assert splits.class_names == list(reference(tmp_path, **test).classes)
    assert not name.startswith("CIFAR") or len(splits.class_names) == CATALOGUE[name].num_classes


def test_caltech101_splits_what_torchvision_reads(tmp_path):
    MAKERS["Caltech101"](tmp_path)
    splits, reference = build("Caltech101", tmp_path), torchvision.datasets.Caltech101(tmp_path)
    assert Counter(content(splits.train) + content(splits.test)) == Counter(content(reference))
    assert (len(splits.train), splits.class_names) == (24, reference.categories)


@pytest.mark.parametrize(("name", "folder"), [("Caltech101", "caltech101"), ("StanfordCars", "stanford_cars")])
def test_train_and_test_folders_are_taken_as_they_are(name, folder, tmp_path):
    MAKERS[name](tmp_path)  # the original layout is there as well: the folders win
    make_folder(tmp_path / folder)
    splits = build(name, tmp_path)
    assert (len(splits.train), len(splits.test), splits.class_names) == (TRAIN, TEST, list(CLASSES))


def test_stanford_dogs_is_split_80_to_20_by_the_seed(tmp_path):
    MAKERS["StanfordDogs"](tmp_path)
    first, again, other = ([*map(content, build("StanfordDogs", tmp_path, seed)[:2])] for seed in (1, 1, 2))
    assert [len(part) for part in first] == [24, 6] and len(set(first[0] + first[1])) == 30
    assert first == again != other


def test_digits_are_all_there_once(tmp_path):
    splits, reference = build("digits", tmp_path), load_digits()
    assert (len(splits.train), len(splits.test)) == (1198, 599)
    grey = np.round(reference.images * 255 / 16).astype(np.uint8)
    expected = [(np.stack([image] * 3, -1).tobytes(), int(target)) for image, target in zip(grey, reference.target)]
    assert Counter(content(splits.train) + content(splits.test)) == Counter(expected)


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("Flowers102", "scipy.io")])
def test_a_missing_package_is_named_with_the_pip_line(name, module, tmp_path, monkeypatch):
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
        ("Flowers102", "flowers-102", "download=True"),
        ("DTD", "dtd/dtd", "download=True"),
        ("Caltech101", "caltech101/101_ObjectCategories", "download=True.*train/<class>"),
        ("StanfordCars", "stanford_cars", "no longer offers.*train/<class>"),
        ("StanfordDogs", "stanford_dogs/Images", "vision.stanford.edu.*<breed>"),
        ("folder", "train", "train/<class>"),
    ],
)
def test_missing_data_says_where_it_must_be_and_how_to_get_it(name, place, advice, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"needs {tmp_path / place}, which does not exist.*{advice}"):
        build(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "Flowers102", "StanfordCars"])
def test_incomplete_or_damaged_official_files_are_refused(name, tmp_path):
    MAKERS[name](tmp_path)  # with contents whose checksums are not the official ones
    advice = "download=True"
    if name == "StanfordCars":
        (tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat").unlink()
        advice = "no longer offers.*devkit"
    with pytest.raises(FileNotFoundError, match=f"{name} .* incomplete or damaged.*{advice}"):
        build(name, tmp_path)


def test_folder_takes_val_where_there_is_no_test_and_differing_classes_are_named(tmp_path):
    make_folder(tmp_path)
    shutil.move(tmp_path / "test", tmp_path / "val")
    assert len(build("folder", tmp_path).test) == TEST
    make_class_folders(tmp_path / "val", 1, (*CLASSES, "dog"))
    shutil.rmtree(tmp_path / "val" / "bike")
    with pytest.raises(ValueError, match=r"only the first has \['bike'\], only the second \['dog'\]"):
        build("folder", tmp_path)


def test_the_spelling_of_names_does_not_matter_and_an_unknown_one_gives_the_nearest():
    for spelling in ("stanforddogs", "stanford_dogs", "Stanford-Dogs", "StanfordDogs"):
        assert find_dataset(spelling) == "StanfordDogs"
    with pytest.raises(ValueError, match=r"Unknown data set 'StanfordCar'. Did you mean StanfordCars"):
        find_dataset("StanfordCar")
    with pytest.raises(ValueError, match=r"Unknown data set 'zzz'. Known are CIFAR10, .*<root>/train/<class>"):
        find_dataset("zzz")
