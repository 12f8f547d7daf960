import sys

import pytest
from PIL import Image

from flow_lightning.quickstart.photographs import crop_boxes, packaged_photographs


def test_the_photographs_are_in_colour_and_large_enough():
    files = packaged_photographs()
    assert len(files) == len(set(files)) == 27
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "RGB" and min(image.size) >= 300


@pytest.mark.parametrize(("width", "height"), [(640, 427), (512, 512), (300, 451)])
def test_boxes_are_squares_that_reach_every_border(width, height):
    boxes = crop_boxes(width, height)
    assert len(set(boxes)) == 18
    for part in (boxes[:9], boxes[9:]):
        lefts, uppers, rights, lowers = zip(*part, strict=True)
        assert (min(lefts), min(uppers), max(rights), max(lowers)) == (0, 0, width, height)
    sides = {(right - left, lower - upper) for left, upper, right, lower in boxes}
    assert sides == {(round(share * min(width, height)),) * 2 for share in (0.75, 0.5)}


def test_a_missing_package_or_photograph_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"'skimage' is needed for.*pip install \"flow-lightning\[quickstart\]\""):
        packaged_photographs()
    monkeypatch.delitem(sys.modules, "skimage")
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"version of skimage lacks .*skimage/data/astronaut\.png"):
        packaged_photographs()
