import multiprocessing
import os
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from flow_lightning.data import decoded as decoded_file
from flow_lightning.data.decoded import decode
from flow_lightning.data.sources import LabelledImages, read_class_folders
from flow_lightning.files import alone
from tests.data.fake_datasets import make_class_folders, picture, save_picture

FILE = Path("images.npy")


@pytest.fixture
def images(tmp_path):
    """Twelve image files of three classes, below a folder."""
    make_class_folders(tmp_path / "train")
    return read_class_folders(tmp_path / "train")[0]


def decoded(images, size=8, file=FILE, **settings):
    settings = {"interpolation": "bilinear", "root": Path("train")} | settings
    return decode([images], file, size, **settings).of(images)


def identity():
    """What changes if the file is written anew."""
    return os.stat(FILE).st_ino, os.stat(FILE).st_mtime_ns


@pytest.mark.parametrize("workers", [0, 2])
def test_the_file_holds_what_torchvision_makes_of_the_images(images, workers):
    found = decoded(images, interpolation="bicubic", workers=workers)
    resize = v2.Resize((8, 8), v2.InterpolationMode.BICUBIC)
    expected = np.stack([np.asarray(resize(image)) for image, _ in images])
    assert np.array_equal(np.load(FILE), expected) and np.load(FILE, mmap_mode="r").dtype == np.uint8
    for (image, target), pixels, label in zip(found, expected, images.targets):
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels) and target == label
    assert found.targets == images.targets and sorted(os.listdir()) == ["images.npy", "train"]


def test_parts_follow_each_other_and_arrays_serve_too():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    first, second = (LabelledImages(zip(part, range(9)), Image.fromarray) for part in (pixels[:3], pixels[3:]))
    reader = decode([first, second], FILE, 4, "nearest", Path())
    images = reader.of(second, 3)
    for (image, target), (own, label) in zip(images.part([1, 0]), second.part([1, 0])):
        assert np.array_equal(np.asarray(image), np.asarray(own.resize((4, 4), Image.Resampling.NEAREST)))
        assert target == label
    assert len(images) == 2


def change_time(folder):
    os.utime(folder / "bike" / "000.png", (1, 1))


def add(folder):
    save_picture(folder / "bike" / "1000.png", 3, 1)


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (lambda folder: None, {}, None),
        (change_time, {}, "images have changed since"),
        (add, {}, "it was made from other images"),
        (lambda folder: (folder / "bike").rename(folder / "boat"), {}, "it was made from other images"),
        (lambda folder: None, {"size": 9}, "it was made with other settings (8 pixels, bilinear, Pillow"),
        (lambda folder: None, {"interpolation": "box"}, "it was made with other settings"),
    ],
)
def test_a_file_is_made_anew_only_where_it_is_not_true_any_more_and_says_why(images, change, settings, reason, caplog):
    decoded(images)
    before = identity()
    change(Path("train").absolute())
    again = read_class_folders(Path("train").absolute())[0]
    with caplog.at_level("INFO"):
        found = decoded(again, root=Path("train").absolute(), **settings)
    assert (identity() == before) == (reason is None) and (reason or "") in caplog.text
    assert len(found) == len(again) == len(np.load(FILE)) and found[0][0].size[0] == settings.get("size", 8)


def test_a_moved_folder_with_the_same_files_keeps_its_file(images, tmp_path):
    decoded(images, root=tmp_path / "train")
    before = identity()
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    decoded(read_class_folders(tmp_path / "elsewhere")[0], root=tmp_path / "elsewhere")
    assert identity() == before


def test_pixels_that_differ_from_the_images_are_found(images, caplog):
    decoded(images)
    with open(FILE, "r+b") as file:  # another pixel of the first image; the rest stays
        file.seek(128)
        value = file.read(1)[0]
        file.seek(128)
        file.write(bytes([value ^ 1]))
    with caplog.at_level("INFO"):
        found = decoded(images)
    assert "image 0 decodes to other pixels now" in caplog.text
    assert np.array_equal(np.asarray(found[0][0]), np.asarray(v2.Resize((8, 8))(images[0][0])))


@pytest.mark.parametrize("content", ["text", "array", "truncated", "empty"])
def test_a_file_that_is_something_else_is_left_as_it_is(images, content):
    decoded(images)
    whole = FILE.read_bytes()
    FILE.write_bytes({"text": b"my notes", "truncated": whole[:-400], "empty": b"", "array": b""}[content])
    if content == "array":
        np.save(FILE, np.zeros(3))
    before = FILE.read_bytes()
    with pytest.raises(ValueError, match=r"images\.npy is no whole file of decoded images.*Delete it"):
        decoded(images)
    assert FILE.read_bytes() == before


def test_a_name_must_end_in_npy(images):
    with pytest.raises(ValueError, match=r"images\.bin\. Give it a name that ends in \.npy"):
        decoded(images, file="images.bin")


def test_too_little_space_is_said_before_anything_is_written(images, monkeypatch):
    monkeypatch.setattr(decoded_file.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"GB for 12 images, but 0\.00 GB are free"):
        decoded(images)
    assert [name for name in os.listdir() if "images" in name] == []


def test_a_failure_leaves_no_file_or_the_one_before(images):
    broken = Path("train/bike/001.png")
    whole = broken.read_bytes()
    for before in ([], ["images.npy"]):
        broken.write_bytes(whole[:100])
        with pytest.raises(OSError, match=r"001\.png.*intact copy"):
            decoded(images)
        assert [name for name in os.listdir() if "images" in name] == before
        broken.write_bytes(whole)
        decoded(images)


def test_a_reader_notices_that_another_program_has_made_the_file_anew(images):
    early, late = decoded(images), decoded(images)
    assert early[0][0].size == (8, 8)
    decoded(images, size=9)
    assert early[1][0].size == (8, 8), "what is mapped stays"
    with pytest.raises(OSError, match="made anew for other images or settings"):
        late[0]


def test_a_reader_is_sent_to_another_process_without_the_pixels(images):
    found = decoded(images, size=64)
    expected = np.asarray(found[0][0])
    sent = ForkingPickler.dumps(found)
    assert len(sent) < 64 * 64 and np.array_equal(np.asarray(ForkingPickler.loads(sent)[0][0]), expected)


def make_slowly(images, count):
    """Decode in a process that notes each image that it reads."""

    def read(image):
        with open("read.txt", "a") as file:
            file.write(".")
        time.sleep(0.01)
        return picture(int(image.sum()) % 1000, 0)

    images.read = read
    decoded(images)
    count.value += 1


def test_one_process_decodes_and_the_others_wait():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3)).astype(np.uint8)
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    images = LabelledImages(zip(pixels, range(30)), Image.fromarray)
    processes = [context.Process(target=make_slowly, args=(images, count)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert count.value == 3 and len(np.load(FILE)) == 30
    assert Path("read.txt").read_text().count(".") == 30 + 2 * decoded_file._CHECKED, "the others check a few"
    assert [name for name in os.listdir() if "images" in name] == ["images.npy"]


def hold(path):
    with alone(path):
        path.with_name(".images.npy.part").write_bytes(b"half of it")
        path.with_name("held").touch()
        time.sleep(600)


def test_a_process_that_is_killed_while_it_decodes_holds_no_one_up(images, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=hold, args=(FILE.absolute(),))
    process.start()
    while not Path("held").exists():
        time.sleep(0.01)
    assert Path(".images.npy.part").exists()
    process.kill()
    process.join(60)
    assert len(decoded(images)) == 12
    assert [name for name in os.listdir() if "images" in name] == ["images.npy"]
