import numpy as np
import pytest
import torch
from PIL import Image

from flow_lightning.data.label_noise import LabelNoise, with_noise, with_wrong_responses
from flow_lightning.data.sources import LabelledImages

TARGETS = torch.arange(1000) % 10


@pytest.mark.parametrize(("rate", "kind"), [(0.3, "uniform"), (0.2, "class"), (0.0, "uniform"), (0.999, "uniform")])
def test_exactly_that_share_is_wrong_and_the_same_in_each_run(rate, kind):
    noisy = LabelNoise(rate, kind)(TARGETS, 10)
    assert int((noisy != TARGETS).sum()) == round(rate * 1000)
    assert torch.equal(noisy, LabelNoise(rate, kind)(TARGETS, 10))
    assert rate == 0 or not torch.equal(noisy, LabelNoise(rate, kind, seed=1)(TARGETS, 10))


def test_uniform_noise_takes_all_other_classes_alike():
    noisy = LabelNoise(0.9)(TARGETS, 10)
    counts = torch.bincount((noisy - TARGETS) % 10, minlength=10)
    assert counts[0] == 100 and counts[1:].min() > 70 and counts[1:].max() < 130


def test_noise_between_classes_goes_to_the_next_one():
    moved = (LabelNoise(0.4, "class")(TARGETS, 10) - TARGETS) % 10
    assert set(moved.tolist()) == {0, 1}


def test_noise_of_instances_takes_what_a_weak_model_confuses():
    scores = torch.full((1000, 10), -9.0)
    scores[torch.arange(1000), TARGETS] = -1.0
    hard = torch.arange(7, 1000, 10)  # of class 7, which looks like a 1
    scores[hard, 1] = -0.5
    noisy = LabelNoise(0.1, "instance")(TARGETS, 10, lambda: scores)
    assert torch.equal((noisy != TARGETS).nonzero().flatten(), hard) and set(noisy[hard].tolist()) == {1}


def test_images_that_look_like_another_class_get_its_label():
    grey = [
        Image.fromarray(np.full((16, 16), value, dtype=np.uint8))
        for value in [20, 25, 30, 35] * 10 + [200, 210, 220, 30] * 10
    ]
    labels = [0] * 40 + [1] * 40
    noisy = with_noise(LabelledImages(zip(grey, labels), read=lambda image: image), LabelNoise(0.125, "instance"), 2)
    wrong = [i for i, (mine, label) in enumerate(zip(noisy.targets, labels)) if mine != label]
    assert wrong == [i for i in range(40, 80) if i % 4 == 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rate": 1.0}, "share from 0 to below 1"), ({"rate": 0.1, "kind": "x"}, "uniform, class, instance")],
)
def test_a_wrong_argument_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LabelNoise(**settings)


@pytest.mark.parametrize("kind", ["uniform", "class"])
def test_a_share_of_the_records_has_the_response_of_another_record(kind):
    records = [{"question": f"question {i}", "answer": f"answer {i}"} for i in range(50)]
    noisy = with_wrong_responses(records, "answer", LabelNoise(0.3, kind))
    assert [record["question"] for record in noisy] == [record["question"] for record in records]
    moved = [i for i, record in enumerate(noisy) if record["answer"] != f"answer {i}"]
    assert len(moved) == 15 and {record["answer"] for record in noisy} <= {record["answer"] for record in records}
    assert kind == "uniform" or all(noisy[i]["answer"] == f"answer {(i + 1) % 50}" for i in moved)


def test_one_record_keeps_its_response_and_instance_noise_needs_classes():
    assert with_wrong_responses([{"answer": "a"}], "answer", LabelNoise(0.9)) == [{"answer": "a"}]
    with pytest.raises(ValueError, match="uniform or class"):
        with_wrong_responses([{"answer": "a"}] * 3, "answer", LabelNoise(0.5, "instance"))
