from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from flow_lightning.data.transforms import RecipeName, larger_size, recipe
from tests.data.fake_datasets import picture

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def by_hand(image: Image.Image) -> torch.Tensor:
    """Normalise with numpy."""
    pixels = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()


def centre(image: Image.Image, size: int) -> Image.Image:
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, upper, left + size, upper + size))


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_both_transforms_give_the_size_and_evaluation_is_deterministic(name: str) -> None:
    train, evaluation = recipe(name, 28, MEAN, STD)
    image = picture(1, 2, (50, 37))
    assert train(image).shape == evaluation(image).shape == (3, 28, 28)
    assert evaluation(image).dtype == torch.float32
    assert torch.equal(evaluation(image), evaluation(image))


@pytest.mark.parametrize("name", ["resize_flip", "none"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_matches_pillow(name: str, mode: str) -> None:
    image = picture(1, 2, (50, 37))
    _, evaluation = recipe(name, 28, MEAN, STD, mode)
    expected = by_hand(image.resize((28, 28), Image.Resampling[mode.upper()]))
    torch.testing.assert_close(evaluation(image), expected, atol=1e-5, rtol=0)


def test_crop_jitter_evaluates_the_centre_of_a_squashed_picture() -> None:
    image = picture(1, 2, (50, 37))
    _, evaluation = recipe("crop_jitter", 28, MEAN, STD)
    expected = by_hand(centre(image.resize((32, 32), Image.Resampling.BILINEAR), 28))
    torch.testing.assert_close(evaluation(image), expected, atol=1e-5, rtol=0)


def test_random_resized_crop_evaluates_the_centre_and_keeps_proportions() -> None:
    image = picture(1, 2, (64, 48))
    _, evaluation = recipe("random_resized_crop", 42, MEAN, STD)
    expected = by_hand(centre(image, 42))  # 48 is the larger size of 42: nothing is resized
    torch.testing.assert_close(evaluation(image), expected, atol=1e-5, rtol=0)


def test_resize_flip_trains_on_the_picture_or_its_mirror_image() -> None:
    train, evaluation = recipe("resize_flip", 28, MEAN, STD)
    image = picture(1, 2)
    plain, seen = evaluation(image), set()
    for _ in range(30):
        augmented = train(image)
        mirrored = torch.equal(augmented, plain.flip(-1))
        assert mirrored or torch.equal(augmented, plain)
        seen.add(mirrored)
    assert seen == {True, False}


def test_none_never_changes_the_picture() -> None:
    train, evaluation = recipe("none", 28, MEAN, STD)
    image = picture(1, 2)
    assert all(torch.equal(train(image), evaluation(image)) for _ in range(10))


def test_the_size_before_a_crop_keeps_the_papers_ratio() -> None:
    assert [larger_size(size) for size in (224, 112, 448)] == [256, 128, 512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixup", 28, MEAN, STD), "Unknown transforms 'mixup'. Use one of resize_flip"),
        (("none", 28, MEAN, STD, "cubic"), "Unknown interpolation 'cubic'. Use one of .*bicubic"),
        (("none", 28, [0.5], [0.5], "bilinear"), "Give three numbers each"),
        (("none", 28, MEAN, [0.0, 1.0, 1.0], "bilinear"), "above 0"),
    ],
)
def test_bad_settings_are_explained(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(*arguments)  # type: ignore[arg-type]
