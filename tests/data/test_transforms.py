from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from flow_lightning.data.transforms import RecipeName, recipe
from tests.data.fake_datasets import picture

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def by_hand(image, size):
    """Cut out the centre and normalise with numpy."""
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    centre = image.crop((left, upper, left + size, upper + size))
    pixels = (np.asarray(centre, dtype=np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_both_transforms_give_the_size_and_only_training_is_random(name):
    train, evaluation = recipe(name, 28, MEAN, STD)
    image = picture(1, 2, (50, 37))
    assert train(image).shape == evaluation(image).shape == (3, 28, 28)
    assert evaluation(image).dtype == torch.float32
    assert torch.equal(evaluation(image), evaluation(image))
    assert name != "none" or all(torch.equal(train(image), evaluation(image)) for _ in range(10))


@pytest.mark.parametrize(
    ("name", "mode", "size", "resized"),
    [
        *[(name, mode, 28, (28, 28)) for name in ("resize_flip", "none") for mode in ("bilinear", "bicubic")],
        ("crop_jitter", "bilinear", 28, (32, 32)),  # squashed
        ("random_resized_crop", "bilinear", 42, (64, 48)),  # in proportion: 48 is the larger size of 42
    ],
)
def test_evaluation_is_the_centre_of_what_pillow_resizes(name, mode, size, resized):
    image = picture(1, 2, (64, 48))
    _, evaluation = recipe(name, size, MEAN, STD, mode)
    expected = by_hand(image.resize(resized, Image.Resampling[mode.upper()]), size)
    torch.testing.assert_close(evaluation(image), expected, atol=1e-5, rtol=0)


def test_resize_flip_trains_on_the_picture_or_its_mirror_image():
    train, evaluation = recipe("resize_flip", 28, MEAN, STD)
    image = picture(1, 2)
    plain, mirrored = evaluation(image), evaluation(image).flip(-1)
    seen = [train(image) for _ in range(30)]
    flips = [torch.equal(augmented, mirrored) for augmented in seen]
    assert {*flips} == {True, False}
    assert all(flip or torch.equal(augmented, plain) for flip, augmented in zip(flips, seen))


def test_the_size_before_a_crop_keeps_the_papers_ratio():
    for size, larger in ((224, 256), (112, 128), (448, 512), (96, 110)):
        assert recipe("crop_jitter", size, MEAN, STD)[1].transforms[0].size == [larger, larger]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixup", 28, MEAN, STD), "Unknown transforms 'mixup'. Use one of resize_flip"),
        (("none", 28, MEAN, STD, "cubic"), "'cubic' is not a valid InterpolationMode"),
        (("none", 28, [0.5], [0.5], "bilinear"), "Give three numbers each"),
        (("none", 28, MEAN, [0.0, 1.0, 1.0], "bilinear"), "above 0"),
    ],
)
def test_bad_settings_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipe(*arguments)
