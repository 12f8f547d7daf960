"""The keys of a measure's numbers, and what pictures derive from them."""

import pytest

from flow_lightning.measures import MEASURES, Answers, GeneralText, HarnessTasks, TargetAccuracy


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_declares_what_its_pictures_show(measure):
    keys = {metric.key: metric for metric in measure.metrics}
    assert len(keys) == len(measure.metrics)
    for panel in measure.panels:
        assert panel.part == measure.part and panel.before in keys
        for key in (panel.main, *panel.bars_after.values()):
            assert (keys[key].unit, keys[key].better) == (panel.unit, panel.better)


def test_keys_say_what_was_measured_and_when():
    kinds = {measure.part: measure for measure in MEASURES}
    target, kept = (kinds[part].__new__(kinds[part]) for part in ("target", "retention"))
    times = ("before", "epoch", "after")
    assert [target.key(when, "x") for when in times] == ["target/before/x", "target/epoch/x", "target/x"]
    assert [kept.key(when, "x") for when in times] == [f"retention/{when}/x" for when in times]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetAccuracy(hard_fraction=0.0), "hard_fraction"),
        (lambda: TargetAccuracy(hard_fraction=1.5), "hard_fraction"),
        (lambda: Answers(max_new_tokens=0), "max_new_tokens"),
        (lambda: Answers(batch_size=0), "batch_size"),
        (lambda: GeneralText(["packaged"], window=1), "window is 1; expected at least 2"),
        (lambda: GeneralText(["packaged"], limit_tokens=1), "limit_tokens"),
        (lambda: GeneralText(["packaged"], batch_size=0), "batch_size"),
        (lambda: HarnessTasks(["mmlu", "mmlu:5"]), "names one more than once"),
        (lambda: HarnessTasks({"a": ["x"], "b": ["x:5"]}), "names one more than once"),
        (lambda: HarnessTasks({"a": ["x"], "b": []}), "at least one in each group"),
        (lambda: HarnessTasks([]), r"tasks is \[\]; expected at least one task"),
        (lambda: HarnessTasks(["mmlu"], limit=0), "limit is 0"),
        (lambda: HarnessTasks(["mmlu"], batch_size=0), "batch_size"),
        (lambda: HarnessTasks([""]), "expected the name of a task"),
        (lambda: HarnessTasks([":5"]), "expected the name of a task"),
    ],
)
def test_unusable_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
