from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flow_lightning.data.retention_images import RetentionImages, retention_images
from tests.data.fake_datasets import picture, save_picture

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def open_images(path: str | Path, **settings: Any) -> RetentionImages:
    arguments: dict[str, Any] = {"image_size": 16, "mean": MEAN, "std": STD}
    return retention_images(path, **(arguments | settings))


def targets(images: RetentionImages) -> list[int]:
    return [images[index]["target"] for index in range(len(images))]


def make_folders(root: Path, names: list[str], per_class: int = 1) -> None:
    for target, name in enumerate(names):
        for number in range(per_class):
            save_picture(root / name / f"{number}.png", number, target)


def write_csv(folder: Path, text: str) -> Path:
    for number in range(3):
        save_picture(folder / "images" / f"{number}.png", number, number)
    (folder / "labels.csv").write_text(text, encoding="utf-8-sig")
    return folder / "labels.csv"


def test_exactly_as_many_folders_as_classes_count_in_sorted_order(tmp_path: Path) -> None:
    make_folders(tmp_path, ["zebra", "ant", "monkey"], per_class=2)
    images = open_images(tmp_path, num_classes=3)
    assert images.labelled and targets(images) == [0, 0, 1, 1, 2, 2]
    assert images.views[0].file.parent.name == "ant"


def test_a_thousand_folders_are_imagenets_classes(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / "val" / f"n{10 * number:08d}").mkdir(parents=True)
    for number in (0, 41, 999):
        Image.new("RGB", (4, 4)).save(tmp_path / "val" / f"n{10 * number:08d}" / "1.png")
    assert targets(open_images(tmp_path)) == [0, 41, 999]


def test_some_of_imagenets_identifiers_are_looked_up(tmp_path: Path) -> None:
    make_folders(tmp_path, ["n02123045", "n01440764", "n15075141"])  # tabby cat, tench, toilet tissue
    assert targets(open_images(tmp_path)) == [0, 281, 999]


def test_folders_named_by_class_index(tmp_path: Path) -> None:
    make_folders(tmp_path, ["10", "9", "0700"])
    images = open_images(tmp_path)
    assert {view.file.parent.name: view.target for view in images.views} == {"10": 10, "9": 9, "0700": 700}


def test_a_csv_gives_files_and_class_indices(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "class_index,file,name\n5,images/2.png,cat\n 7,images/0.png,dog\n")
    images = open_images(path)
    assert images.labelled and targets(images) == [5, 7]
    assert [view.file for view in images.views] == [tmp_path / "images/2.png", tmp_path / "images/0.png"]


def test_any_other_folder_has_no_labels(tmp_path: Path) -> None:
    make_folders(tmp_path, ["holiday", "garden/roses"], per_class=2)
    images = open_images(tmp_path)
    assert not images.labelled and len(images) == 4
    batch = next(iter(DataLoader(images, batch_size=4)))
    assert set(batch) == {"image", "index"} and batch["index"].tolist() == [0, 1, 2, 3]


def test_labelled_batches(tmp_path: Path) -> None:
    make_folders(tmp_path, ["3", "4"])
    batch = next(iter(DataLoader(open_images(tmp_path), batch_size=2)))
    assert set(batch) == {"image", "target", "index"}
    assert batch["image"].shape == (2, 3, 16, 16) and batch["target"].dtype == torch.int64


def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path: Path) -> None:
    image = picture(3, 1, (60, 40))
    image.save(tmp_path / "one.png")
    found = open_images(tmp_path, interpolation="bilinear", crop_pct=0.8)[0]["image"]
    cropped = image.resize((30, 20), Image.Resampling.BILINEAR).crop((7, 2, 23, 18))
    expected = (np.asarray(cropped) / 255 - MEAN) / STD
    torch.testing.assert_close(found.double(), torch.from_numpy(expected.transpose(2, 0, 1)), atol=1e-5, rtol=0)


def test_packaged_images_are_some_500_different_views() -> None:
    images = open_images("packaged", crop_pct=1.0)
    assert not images.labelled and len(images) == 513
    first = [images[index]["image"] for index in range(38)]  # all views of two pictures
    assert len({view.numpy().tobytes() for view in first}) == 38
    assert all(torch.equal(view, images[index]["image"]) for index, view in enumerate(first[:20]))


def test_a_packaged_view_is_the_crop_it_names() -> None:
    images = open_images("packaged", interpolation="bilinear", crop_pct=1.0)
    view = images.views[5]
    with Image.open(view.file) as image:
        cropped = image.convert("RGB").crop(view.box).resize((16, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(cropped) / 255 - MEAN) / STD
    found = images[5]["image"].double()
    torch.testing.assert_close(found, torch.from_numpy(expected.transpose(2, 0, 1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimages/0.png,3\n", r"lacks class_index; the columns .*\['file', 'label'\]"),
        ("", "lacks class_index and file"),
        ("file,class_index\nimages/0.png,1\nimages/1.png,cat\n", "line 3: class_index is 'cat'; .*0 to 999"),
        ("file,class_index\nimages/0.png,1000\n", "line 2: class_index is '1000'"),
        ("file,class_index\nimages/0.png,-1\n", "line 2: class_index is '-1'"),
        ("file,class_index\nimages/0.png\n", "line 2: class_index is ''"),
    ],
)
def test_a_bad_csv_is_explained_by_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(write_csv(tmp_path, text))


def test_a_listed_file_that_is_absent_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "file,class_index\nimages/0.png,1\nimages/9.png,1\n")
    with pytest.raises(FileNotFoundError, match=r"line 3: there is no file .*images/9\.png"):
        open_images(path)
    with pytest.raises(FileNotFoundError, match=r"no image files in .*labels\.csv"):
        open_images(write_csv(tmp_path, "file,class_index\n"))


def test_a_wrong_path_is_named_with_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere is no folder.*'packaged'"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image files in"):
        open_images(tmp_path)


def test_a_class_index_beyond_the_models_is_refused(tmp_path: Path) -> None:
    make_folders(tmp_path, ["3", "1000"])
    with pytest.raises(ValueError, match="class folder 1000 is no class index; expected 0 to 999"):
        open_images(tmp_path)


def test_identifiers_that_cannot_be_looked_up_are_refused(tmp_path: Path) -> None:
    make_folders(tmp_path, ["n01440764", "n99999999"])
    with pytest.raises(ValueError, match=r"\['n99999999'\] are not among ImageNet-1K"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="n99999999"):
        open_images(tmp_path, num_classes=21841)


def test_crop_pct_must_be_a_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"crop_pct is 87.5; expected a share"):
        open_images(tmp_path, crop_pct=87.5)
