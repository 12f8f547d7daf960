"""The keys of a measure's numbers, and what pictures derive from them."""

import pytest

from flow_lightning.measures import MEASURES
from flow_lightning.measures.base import check_at_least


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_declares_what_its_pictures_show(measure):
    keys = {metric.key: metric for metric in measure.metrics}
    assert len(keys) == len(measure.metrics)
    for panel in measure.panels:
        assert panel.part == measure.part and panel.before in keys
        for key in (*panel.groups.values(), *panel.bars_after.values()):
            assert (keys[key].unit, keys[key].better) == (panel.unit, panel.better)


def test_keys_say_what_was_measured_and_when():
    kinds = {measure.part: measure for measure in MEASURES}
    target, kept = (kinds[part].__new__(kinds[part]) for part in ("target", "retention"))
    times = ("before", "epoch", "after")
    assert [target.key(when, "x") for when in times] == ["target/before/x", "target/epoch/x", "target/x"]
    assert [kept.key(when, "x") for when in times] == [f"retention/{when}/x" for when in times]


def test_numbers_that_are_too_small_are_refused():
    check_at_least(2, window=2, limit=None)
    with pytest.raises(ValueError, match="window is 1; expected at least 2"):
        check_at_least(2, window=1)
