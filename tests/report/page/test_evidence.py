"""The file of what a page shows, and what is to see of a sample."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flow_lightning as fl
from flow_lightning.report.page.evidence import Evidence, describe


def pixels(seen):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(seen["picture"].partition(",")[2]))), float)


def test_what_is_saved_comes_back():
    evidence = Evidence(
        {}, {"3": {"text": "a\ud800"}}, [{"index": 1}], [{"step": 1.0, "loss": 2.0}], {"class_names": ["a"]}
    )
    evidence.save(Path())
    assert Evidence.load(Path()) == evidence


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, 1), lambda x: {"image": x}, lambda x: fl.IndexedSample((x, 1), 0)]
)
def test_a_normalised_picture_is_found_in_any_sample_and_shown_in_its_own_colours(wrap):
    mean, std, colour = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1], torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    image = (colour.expand(3, 8, 16) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = pixels(describe(wrap(image), None, mean, std))
    assert shown.shape == (48, 96, 3) and np.abs(shown.mean((0, 1)) - [255, 127.5, 0]).max() < 4


def test_a_pil_picture_and_a_grey_one_without_a_mean_are_shown():
    assert pixels(describe((Image.new("L", (200, 100), 80), 0))).mean() == pytest.approx(80, abs=2)
    ramp = pixels(describe(torch.tensor([[[-3.0, 5.0]]])))  # stretched: the smallest value black, the largest white
    assert ramp.shape == (48, 96, 3) and ramp[:, :40].mean() < 10 and ramp[:, 56:].mean() > 245


def test_texts_are_shown_and_numbers_are_not():
    assert describe(("a text", 1)) == {"text": "a text"}
    assert describe((torch.zeros(4), torch.tensor(1.0))) == {}


class Letters:
    def decode(self, ids):
        return "".join(map(chr, ids))


def test_tokens_are_those_of_the_answer_and_the_prompt_is_apart():
    ids = torch.tensor([ord(c) for c in "Q?yes"])
    expected = {"tokens": {"prompt": "Q?", "answer": ["y", "e", "s"], "cut": False}}
    assert describe({"input_ids": ids, "prompt_length": 2}, Letters()) == expected
    assert describe({"input_ids": ids, "labels": [-100, -100, *ids[2:].tolist()]}, Letters()) == expected
    long = describe({"input_ids": ids.repeat(100), "prompt_length": 2}, Letters())["tokens"]
    assert long["cut"] and len(long["answer"]) == 160
