import math

import numpy as np
import pytest
from scipy.spatial import ConvexHull

from flow_lightning.report.frontier import (
    Point,
    area_between,
    bootstrap,
    compare_methods,
    frontier,
    retention_at,
    target_at,
)


def point(target: float, retention: float, method: str = "flow", seed: int = 0, chosen_by: object = None) -> Point:
    return Point(method, seed, 0.1, 1.0, target, retention, chosen_by or (target, retention))


def test_the_frontier_is_the_upper_part_of_the_convex_hull() -> None:
    cloud = np.random.default_rng(0).random((60, 2))
    retention, target = frontier([point(t, r) for r, t in cloud])
    hull = cloud[ConvexHull(cloud).vertices]
    best, safest = hull[hull[:, 1].argmax()], hull[hull[:, 0].argmax()]
    above = [v for v in hull if best[0] <= v[0] <= safest[0] and v[1] >= np.interp(v[0], *zip(best, safest))]
    expected = np.array(sorted(map(tuple, above)))
    np.testing.assert_array_equal(np.column_stack([retention, target]), expected)
    assert (np.diff(target) < 0).all()


def test_points_that_are_worse_in_both_are_not_on_it() -> None:
    retention, target = frontier([point(0.8, 0.9), point(0.7, 0.85), point(0.8, 0.7), point(0.5, 1.0)])
    assert (retention.tolist(), target.tolist()) == ([0.9, 1.0], [0.8, 0.5])


def test_what_is_on_it_is_chosen_on_one_half_and_its_numbers_are_those_of_the_other() -> None:
    lucky = point(0.99, 0.99, chosen_by=(0.6, 0.8))  # below the hull of what chooses
    line = [point(0.5, 1.0), point(0.7, 0.85, chosen_by=(0.7, 0.9)), point(0.65, 0.9, chosen_by=(0.8, 0.7))]
    retention, target = frontier([lucky, *line])
    assert retention.tolist() == [0.85, 0.9, 1.0] and target.tolist() == [0.7, 0.65, 0.5]
    tied = [point(0.5, 1.0), point(0.8, 0.95, chosen_by=(0.7, 0.95)), point(0.8, 0.9, chosen_by=(0.9, 0.85))]
    assert [each.tolist() for each in frontier(tied)] == [[0.95, 1.0], [0.8, 0.5]]
    same = [point(0.8, 0.8, chosen_by=(0.9, 1.0)), point(0.6, 0.7, chosen_by=(0.8, 1.0))]
    assert [each.tolist() for each in frontier(same)] == [[0.8], [0.8]]


def test_a_budget_chooses_on_one_half_and_reports_the_other() -> None:
    lucky = point(0.70, 0.90, chosen_by=(0.9, 0.99))
    honest = point(0.75, 0.99, chosen_by=(0.8, 0.985))
    forgetful = point(0.99, 0.5, chosen_by=(0.99, 0.5))
    points = [lucky, honest, forgetful]
    assert target_at(points, 0.98) == 0.70, "what it reached on the test set, not what it was chosen by"
    assert target_at([honest, forgetful], 0.98) == 0.75
    assert math.isnan(target_at(points, 0.995))
    assert retention_at(points, 0.85) == 0.90
    assert math.isnan(retention_at(points, 0.999))


def test_the_area_between_two_lines_is_known() -> None:
    high, low = (np.array([0.8, 1.0]), np.array([0.9, 0.5])), (np.array([0.6, 0.9]), np.array([0.8, 0.5]))
    # At target 0.5: 1.0 - 0.9; at 0.8: 0.85 - 0.6; linear between.
    assert area_between(high, low) == pytest.approx((0.1 + 0.25) / 2)
    assert area_between(low, high) == pytest.approx(-(0.1 + 0.25) / 2)
    assert math.isnan(area_between(high, (np.array([0.5, 0.6]), np.array([0.4, 0.3]))))


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    intervals = [bootstrap(generator.normal(0.3, 1, 40).tolist()) for _ in range(200)]
    covered = np.mean([low <= 0.3 <= high for _, low, high in intervals])
    assert 0.89 <= covered <= 0.99
    assert bootstrap([0.5, float("nan"), 0.5]) == (0.5, 0.5, 0.5)
    assert all(math.isnan(value) for value in bootstrap([]))
    mean, *ends = bootstrap([0.25])
    assert mean == 0.25 and all(map(math.isnan, ends)), "one seed tells nothing of the spread"


def test_methods_are_compared_seed_by_seed() -> None:
    points = []
    for seed, shift in enumerate([0.0, 0.1, 0.2]):  # a seed moves both methods alike
        for method, gain in (("standard", 0.0), ("flow", 0.03)):
            points += [
                point(0.5 + shift, 1.0, method, seed),
                point(0.6 + shift + gain, 0.985, method, seed),
                point(0.7 + shift + gain, 0.9, method, seed),
            ]
    numbers = compare_methods(points, "standard")
    assert numbers["standard"]["target@0.98"][0] == pytest.approx(0.7)
    assert numbers["flow"]["gain@0.98"] == pytest.approx((0.03, 0.03, 0.03)), "paired: the seeds' shift is gone"
    assert numbers["flow"]["retention@0.9"][0] == pytest.approx(0.9)
    assert numbers["flow"]["area"][1] > 0
    assert "area" not in numbers["standard"]
