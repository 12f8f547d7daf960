"""The statistics of the budget: against scipy, against numbers worked out elsewhere, and the promise itself."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from flow_lightning.method.budget import (
    accuracy_kept,
    agreement_kept,
    last_kept,
    net_p_value,
    perplexity_kept,
    samples_needed,
    upper_bound,
)

DRAWS = 4000


def most(draws, rate=0.05):
    """Return how many of the draws break a promise of that rate at most, with a probability of 99.9 %."""
    return stats.binom.ppf(0.999, draws, rate)


def answers(right, lost, gained, wrong):
    """Return right answers before and after: `right` in both, `lost` before alone, `gained` after alone."""
    before = torch.tensor([1] * (right + lost) + [0] * (gained + wrong))
    after = torch.tensor([1] * right + [0] * lost + [1] * gained + [0] * wrong)
    return before, after


@pytest.mark.parametrize("events", [0, 1, 4, 29, 99, 100])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_the_upper_bound_is_that_of_clopper_and_pearson(events, confidence):
    expected = stats.binomtest(events, 100).proportion_ci(1 - 2 * (1 - confidence), "exact").high
    assert upper_bound(events, 100, confidence) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("flips", "n"), [(4, 513), (29, 2000)])
def test_so_many_flips_keep_98_percent_with_95_percent_confidence_and_one_more_does_not(flips, n):
    for more, kept in ((0, True), (1, False)):
        changed = torch.arange(n) < flips + more
        assert (agreement_kept(torch.zeros(n), changed.float(), 0.95).bound >= 0.98) == kept
        assert (net_p_value(n, flips + more, 0, 0.98) <= 0.05) == kept
    assert agreement_kept(torch.zeros(n), changed.float(), 0.95).share == pytest.approx(1 - (flips + 1) / n)


@pytest.mark.parametrize("keep", [0.9, 0.98, 0.99])
@pytest.mark.parametrize("of", ["agreement", "accuracy"])
def test_so_many_samples_are_needed(keep, of):
    needed = samples_needed(keep, 0.95, of)
    compare = {"agreement": agreement_kept, "accuracy": accuracy_kept}[of]
    same = torch.ones(needed)
    assert compare(same, same, 0.95).bound >= keep - 1e-4
    assert compare(same[1:], same[1:], 0.95).bound < keep
    assert needed - math.log(0.05) / math.log(keep) < 2
    assert samples_needed(0.98, 0.95, of) == 149
    assert 456 <= samples_needed(0.98, 0.9999, of) <= 459


@pytest.mark.parametrize(("relevant", "lost", "gained"), [(60, 2, 0), (60, 5, 9), (40, 0, 0), (50, 10, 2)])
def test_the_p_value_is_the_sum_over_all_outcomes(relevant, lost, gained):
    """By enumeration with scipy, over the same range of the nuisance parameter."""
    keep = 0.9

    def statistic(lost, gained):
        variance = relevant * keep * ((1 - keep) + (1 + keep) * gained / relevant)
        return (lost - keep * gained - (1 - keep) * relevant) / np.sqrt(variance)

    losses, gains = np.meshgrid(np.arange(relevant + 1), np.arange(relevant + 1), indexing="ij")
    possible = losses + gains <= relevant
    chosen = possible & (statistic(losses, gains) <= statistic(lost, gained) + 1e-12)
    range_ = stats.binomtest(gained, relevant).proportion_ci(1 - 1e-4, "exact")
    outcomes = np.stack([losses, gains, relevant - losses - gains], axis=-1)[chosen]
    expected = max(
        stats.multinomial.pmf(outcomes, relevant, [0.1 + keep * g, g, 0.9 - keep * g - g]).sum()
        for g in np.linspace(range_.low, min(range_.high, 0.9 / 1.9 - 1e-9), 33)
    )
    assert net_p_value(relevant, lost, gained, keep) == pytest.approx(min(1, expected + 1e-4), abs=1e-6)


@pytest.mark.parametrize(
    "table", [(300, 0, 0, 50), (290, 10, 12, 0), (200, 40, 60, 9), (290, 10, 2, 400), (0, 9, 9, 9)]
)
def test_the_bound_on_accuracy_is_the_share_that_is_just_refused(table):
    right, lost, gained, _ = table
    kept = accuracy_kept(*answers(*table), 0.95)
    assert kept.share == pytest.approx((right + gained) / (right + lost))
    assert net_p_value(right + lost + gained, lost, gained, kept.bound) <= 0.05
    assert net_p_value(right + lost + gained, lost, gained, kept.bound + 2e-4) > 0.05


def test_gains_count_for_accuracy_and_wrong_answers_do_not():
    without = accuracy_kept(*answers(480, 20, 0, 0), 0.95)
    assert accuracy_kept(*answers(480, 20, 20, 0), 0.95).bound > without.bound + 0.01
    assert accuracy_kept(*answers(480, 20, 0, 300), 0.95) == without
    nothing = torch.zeros(9)
    assert accuracy_kept(nothing, nothing, 0.95) == (0, 0)


# -- the promise: a budget that is just broken is kept in at most 5 % of the draws -------------------------------------


@pytest.mark.parametrize(("n", "keep"), [(160, 0.98), (513, 0.98), (120, 0.9)])
def test_agreement_at_the_border_is_refused_in_95_percent_of_the_draws(n, keep):
    flips = np.random.default_rng(1).binomial(n, 1 - keep, DRAWS)
    kept = {k: 1 - upper_bound(k, n, 0.95) > keep for k in np.unique(flips)}
    assert 0 < sum(kept[k] for k in flips) <= most(DRAWS)


@pytest.mark.parametrize(
    ("n", "keep", "gain", "wrong"),
    [(200, 0.98, 0.0, 0.0), (200, 0.98, 0.02, 0.0), (150, 0.9, 0.03, 0.5)],
)
def test_accuracy_at_the_border_is_refused_in_95_percent_of_the_draws(n, keep, gain, wrong):
    """Also if the number of samples that one of the models has right differs from draw to draw."""
    lost = (1 - keep) + keep * gain
    rates = np.array([lost, gain, 1 - lost - gain]) * (1 - wrong)
    draws = 250 if wrong else 500  # with wrong ones there are nearly as many tables as draws
    tables = np.random.default_rng(2).multinomial(n, [*rates, wrong], draws)[:, :3]
    tables, counts = np.unique(tables, axis=0, return_counts=True)
    kept = [net_p_value(int(table.sum()), int(table[0]), int(table[1]), keep) <= 0.05 for table in tables]
    assert 0 < counts[kept].sum() <= most(draws)


@pytest.mark.parametrize(("n", "skewed"), [(30, False), (60, True)])
def test_perplexity_at_the_border_is_refused_in_about_95_percent_of_the_draws(n, skewed):
    """A bootstrap is not exact: with few and skewed texts it fails a little more often."""
    generator, draws = np.random.default_rng(3), 200
    tokens = generator.integers(200, 1024, (draws, n))
    noise = generator.gamma(2.0, 1 / 2, (draws, n)) - 1 if skewed else generator.normal(size=(draws, n))
    worse = tokens * (-math.log(0.98) + 0.05 * noise)  # the true share is 0.98
    level = tokens * generator.normal(3, 0.5, (draws, n))
    kept = 0
    for row in range(draws):
        before = torch.from_numpy(np.stack([level[row], tokens[row]], axis=1))
        after = before + torch.from_numpy(np.stack([worse[row], 0 * tokens[row]], axis=1))
        kept += perplexity_kept(before, after, 0.95).bound > 0.98
    assert 0 < kept <= most(draws, 0.06)


def test_the_chosen_point_of_a_path_keeps_the_budget_in_95_percent_of_the_draws():
    """The second of five nested points loses one sample in 10,000 more than the budget allows."""
    rates, n = np.array([0.004, 0.0201, 0.021, 0.04, 0.1]), 600
    flips = (np.random.default_rng(4).random((DRAWS, n, 1)) < rates).sum(axis=1)
    bounds = {k: 1 - upper_bound(k, n, 0.95) for k in np.unique(flips)}
    chosen = np.array([last_kept([bounds[k] for k in row], 0.98) for row in flips])
    assert 0 < (chosen >= 1).sum() <= most(DRAWS)  # each of these breaks the promise
    assert (chosen >= 0).mean() > 0.9  # and the first point is mostly found


def test_the_sequence_ends_at_the_first_point_that_is_not_kept():
    assert last_kept([0.99, 0.97, 0.99], 0.98) == 0
    assert last_kept([0.5, 0.99], 0.98) == -1
    assert last_kept([0.99, 0.98], 0.98) == 1
    assert last_kept([], 0.98) == -1


def test_perplexity_is_that_of_all_tokens_and_a_diverged_model_keeps_nothing():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 1000, (50,), generator=generator).double()
    before = torch.stack([3 * tokens, tokens], dim=1)
    after = torch.stack([(3.1 + 0.1 * torch.randn(50, generator=generator).double()) * tokens, tokens], dim=1)
    kept = perplexity_kept(before, after, 0.95)
    ratio = np.exp(((before - after)[:, 0].sum() / tokens.sum()).item())
    assert kept.share == pytest.approx(ratio) and 0.85 < kept.bound < kept.share
    assert perplexity_kept(before, after, 0.99).bound < kept.bound
    assert perplexity_kept(before, before, 0.95) == (1, 1)
    assert perplexity_kept(before, after * torch.nan, 0.95) == (0, 0)
    assert perplexity_kept(before[:29], before[:29], 0.95).bound == 0 and samples_needed(0.98, 0.95, "perplexity") == 30


def test_agreement_of_tokens_at_the_border_is_refused_in_about_95_percent_of_the_draws():
    """Tokens of a text flip together, so that counting them as independent breaks the promise."""
    generator, draws, n, tokens = np.random.default_rng(5), 150, 60, 50
    before, kept, naive = torch.zeros(n, tokens, dtype=torch.int32), 0, 0
    for _ in range(draws):
        rate = generator.beta(0.1 * 19, 0.9 * 19, n)  # the true share is 0.9
        after = torch.from_numpy((generator.random((n, tokens)) < rate[:, None]).astype(np.int32))
        kept += agreement_kept(before, after, 0.95).bound > 0.9
        naive += agreement_kept(before.flatten(), after.flatten(), 0.95).bound > 0.9
    assert 0 < kept <= most(draws, 0.06) < naive


def test_agreement_of_tokens_is_that_of_all_tokens_that_there_are():
    before = torch.arange(40 * 7).reshape(40, 7)
    before[::2, 5:] = -1  # shorter texts
    after = before.clone()
    after[3, 2:5], after[0, 6], after[4, 0] = 0, 9, -1  # three flips, one behind the end, one NaN
    kept = agreement_kept(before, after, 0.95)
    assert kept.share == pytest.approx(1 - 4 / (40 * 7 - 20 * 2)) and 0.9 < kept.bound < kept.share
    assert agreement_kept(before, before, 0.95) == (1, pytest.approx(0.05 ** (1 / 240)))
    assert agreement_kept(before, torch.full_like(before, -1), 0.95) == (0, 0)
    assert samples_needed(0.98, 0.95, texts=True) == 30
