import numpy as np
import pytest
from PIL import Image

from flow_lightning.data.sources import (
    LabelledImages,
    image_paths,
    read_class_folders,
    read_image,
)
from tests.data.fake_datasets import CLASSES, make_class_folders, picture, save_picture


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_unreadable_image_is_named(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    save_picture(path, 1, 1)
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2], None):
        path.unlink() if content is None else path.write_bytes(content)
        for read in (read_image, lambda path: LabelledImages([(path, 0)])[0]):
            with pytest.raises(OSError, match=f"photo{suffix}.*intact copy"):
                read(path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    picture(1, 1).convert(mode).save("image.tif")
    assert read_image("image.tif").mode == "RGB"


def test_arrays_give_back_their_pixels_and_targets_also_in_parts():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    dataset = LabelledImages(zip(pixels, np.array([3, 1, 2])), Image.fromarray)
    for images, position in ((dataset, 1), (dataset.part([2, 1]).part([1]), 0)):
        image, target = images[position]
        assert (np.asarray(image) == pixels[1]).all() and target == images.targets[position] == 1
    assert (len(dataset), dataset.targets) == (3, [3, 1, 2])


def test_class_folders_are_read_in_sorted_order_with_nested_files_of_any_case(tmp_path):
    make_class_folders(tmp_path, per_class=2)
    save_picture(tmp_path / "cat" / "more" / "1.PNG", 0, 0)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._000.png").write_bytes(b"resource fork")
    files, names = read_class_folders(tmp_path)
    assert names == list(CLASSES)
    assert files.targets == [0, 0, 1, 1, 2, 2, 2]
    assert [path.relative_to(tmp_path).parts[0] for path, _ in files.samples] == [CLASSES[k] for k in files.targets]
    assert [path.name for path in image_paths(tmp_path / "cat")] == ["000.png", "001.png", "1.PNG"]


def test_folders_without_classes_or_images_are_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(FileNotFoundError, match=r"one folder of images per class.*has no folders"):
        read_class_folders(tmp_path)
    make_class_folders(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no images in \['dog'\]"):
        read_class_folders(tmp_path)
