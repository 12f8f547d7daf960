"""Images of the pre-trained task: which files and labels there are, and how they are resized and cropped."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flow_lightning.data.retention_images import retention_images
from tests.data.fake_datasets import make_class_folders, picture

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def open_images(path=".", **settings):
    return retention_images(path, **({"image_size": 16, "mean": MEAN, "std": STD} | settings))


def make_folders(root, names, per_class=1):
    for name in names:
        make_class_folders(root, per_class, (name,))


def assert_is(image, expected):
    """Compare a sample with pixels `[H, W, 3]` of 0 to 255."""
    expected = ((np.asarray(expected) / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(image, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("folders", "num_classes", "expected"),
    [
        (["zebra", "ant", "monkey"], 3, {"ant": 0, "monkey": 1, "zebra": 2}),  # as many as classes: sorted order
        (["10", "9", "0700"], 1000, {"10": 10, "9": 9, "0700": 700}),
        (["n02123045", "n01440764", "n15075141"], 1000, {"n01440764": 0, "n02123045": 281, "n15075141": 999}),
    ],
)
def test_names_of_folders_give_class_indices(folders, num_classes, expected, tmp_path):
    make_folders(tmp_path, folders, per_class=2)
    images = open_images(num_classes=num_classes)
    assert images.labelled and len(images) == 6
    assert {view.file.parent.name: view.target for view in images.views} == expected
    batch = next(iter(DataLoader(images, batch_size=6)))
    assert set(batch) == {"image", "target", "index"} and sorted(batch["target"]) == sorted([*expected.values()] * 2)
    assert batch["image"].shape == (6, 3, 16, 16) and batch["target"].dtype == torch.int64


def test_as_many_folders_as_classes_are_the_classes_and_a_folder_val_is_taken_instead(tmp_path):
    make_folders(tmp_path / "val", [f"n{10 * number:08d}" for number in (0, 3, 4)])  # not ImageNet-1K's
    for empty in (1, 2):
        (tmp_path / "val" / f"n{10 * empty:08d}").mkdir()
    assert [view.target for view in open_images(num_classes=5).views] == [0, 3, 4]


def test_a_csv_gives_files_and_class_indices(tmp_path):
    make_folders(tmp_path, ["images"], per_class=3)
    text = "class_index,file,name\n5,images/002.png,cat\n 7,images/000.png,dog\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig")
    images = open_images(tmp_path / "labels.csv")
    assert images.labelled and [images[index]["target"] for index in range(2)] == [5, 7]
    assert [view.file for view in images.views] == [tmp_path / "images/002.png", tmp_path / "images/000.png"]


def test_any_other_folder_has_no_labels(tmp_path):
    make_folders(tmp_path, ["holiday", "garden/roses"], per_class=2)
    images = open_images()
    assert not images.labelled and len(images) == 4
    batch = next(iter(DataLoader(images, batch_size=4)))
    assert set(batch) == {"image", "index"} and batch["index"].tolist() == [0, 1, 2, 3]


def test_the_shorter_side_is_resized_and_the_centre_cropped():
    image = picture(3, 1, (60, 40))
    image.save("one.png")
    cropped = image.resize((30, 20), Image.Resampling.BILINEAR).crop((7, 2, 23, 18))
    assert_is(open_images(interpolation="bilinear", crop_pct=0.8)[0]["image"], cropped)


def test_packaged_images_are_some_500_different_views():
    images = open_images("packaged", interpolation="bilinear", crop_pct=1.0)
    assert not images.labelled and len(images) == 513
    first = [images[index]["image"] for index in range(38)]  # all views of two pictures
    assert len({view.numpy().tobytes() for view in first}) == 38
    assert all(torch.equal(view, images[index]["image"]) for index, view in enumerate(first[:20]))
    view = images.views[5]
    with Image.open(view.file) as image:
        cropped = image.convert("RGB").crop(view.box).resize((16, 16), Image.Resampling.BILINEAR)
    assert_is(first[5], cropped)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimages/000.png,3\n", "line 2: file is 'images/000.png' and class_index ''"),
        ("name,class_index\nimages/000.png,3\n", "line 2: file is None and class_index '3'"),
        ("", r"no image files in .*labels\.csv"),
        ("file,class_index\nimages/000.png,1\nimages/001.png,cat\n", "line 3: .* and class_index 'cat'.*0 to 999"),
        ("file,class_index\nimages/000.png,1000\n", "line 2: .* and class_index '1000'"),
        ("file,class_index\nimages/000.png,-1\n", "line 2: .* and class_index '-1'"),
    ],
)
def test_a_bad_csv_is_explained_by_line(text, message, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_images("labels.csv")


@pytest.mark.parametrize(
    ("folders", "settings", "error", "message"),
    [
        ([], {"path": "nowhere"}, FileNotFoundError, "/nowhere is no folder.*'packaged'"),
        ([], {}, FileNotFoundError, "no image files in"),
        (["3", "1000"], {}, ValueError, r"\['1000'\] are none of the 1000 classes.*0 to 999"),
        (["n01440764", "n99999999"], {}, ValueError, r"\['n99999999'\] are none of .*ImageNet-1K"),
        (["n01440764"], {"num_classes": 21841}, ValueError, "none of the 21841 classes"),
    ],
)
def test_unusable_folders_and_settings_are_explained(folders, settings, error, message, tmp_path):
    make_folders(tmp_path, folders)
    with pytest.raises(error, match=message):
        open_images(**settings)
