"""What a page says of a run in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from flow_lightning.report.page.files import RunFiles
from flow_lightning.report.page.run_page import sections, summary, wilson
from tests.report.page.example import METRICS


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_that_of_scipy(sample):
    count, n = sample
    expected = binomtest(count, n).proportion_ci(0.95, "wilson")
    assert wilson(count / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_summary_says_what_rose_and_what_fell_with_intervals():
    learned, kept = summary(METRICS)
    low, high = binomtest(30, 40).proportion_ci(0.95, "wilson")
    assert learned == (
        "Learned: target accuracy rose from 50.0\u00a0% to 75.0\u00a0% "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}\u00a0%, 40 samples)."
    )
    assert kept.startswith("Kept: pre-trained task fell from 90.0\u00a0% to 80.0\u00a0% (95 % interval")


def test_the_summary_says_whether_the_budget_is_surely_kept():
    numbers = {"keep": 0.9, "alpha": 0.5, "kept": 0.95, "bound": 0.92, "kept_other_half": 0.94}
    metrics = {f"budget/{name}": value for name, value in numbers.items()}
    assert "The budget of 90.0\u00a0% is kept: the model at alpha 0.5 keeps 95.0\u00a0%" in summary(metrics)[0]
    assert "is not kept" in summary(metrics | {"budget/bound": 0.89})[0]


def test_a_loss_falls_in_nats_and_an_equal_share_stays():
    assert summary({"target/before/loss": 2.0, "target/loss": 1.5}) == [
        "Learned: target loss fell from 2.000 to 1.500."
    ]
    assert "stayed at 50.0\u00a0%" in summary({"target/before/top1": 0.5, "target/top1": 0.5})[0]


def test_an_empty_run_says_in_each_section_what_is_not_there(tmp_path):
    parts = list(sections(RunFiles(tmp_path)))
    assert len(parts) == 6 and all(part.text for part in parts) and not any(part.charts for part in parts)
    assert parts[0].text == ["The run has no results yet."]
