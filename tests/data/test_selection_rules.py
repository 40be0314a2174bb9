"""Formulas that choose records: against naive twins, and identities."""

from collections import Counter

import numpy as np
import pytest

from mmkd.data.selection_rules import (
    NothingToChooseByError,
    balanced,
    between,
    binned,
    count_of,
    largest,
    robust,
    robust_probabilities,
    sampled,
)


def draws(seed, count=40):
    return np.random.default_rng(seed).random(count) + 0.01


# Differences


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_values_are_kept_in_order(seed):
    values = draws(seed)
    wanted = sorted(sorted(range(40), key=lambda i: -values[i])[:13])
    assert largest(values, 13).tolist() == wanted
    assert largest(values + 5, 13).tolist() == wanted  # both losses larger by a constant
    lowest = set(largest(-values, 27).tolist())  # the two models exchanged
    assert lowest == set(range(40)) - set(wanted)


def test_equal_values_keep_the_first_and_missing_ones_are_left_out():
    values = np.array([2.0, np.nan, 1.0, 2.0, 2.0])
    assert largest(values, 2).tolist() == [0, 3]
    assert largest(values, 9).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.3, 0.3 + 1e-7], [np.nan, np.nan], [1.0]])
def test_nothing_to_choose_by(values):
    with pytest.raises(NothingToChooseByError):
        largest(np.array(values), 1)


def test_shares_are_rounded_and_keep_one():
    assert [count_of(s, n) for s, n in [(0.5, 12_000), (0.29, 100), (0.01, 10)]] == [6000, 29, 1]


# Robust choice


def value(p, gains, wrong):
    """Smallest expected gain if `wrong` answers are incorrect, over all choices of them."""
    return np.sort(p * gains, -1)[..., : len(gains) - wrong].sum(-1)


def published(gains, wrong):
    """The solution of the paper, for one record."""
    values = [(k - wrong) / (1 / gains[:k]).sum() for k in range(1, len(gains) + 1)]
    k = int(np.argmax(values)) + 1
    q = np.zeros(len(gains))
    q[:k] = (1 / gains[:k]) / (1 / gains[:k]).sum()
    return q


def others(best, budget, seed):
    """Other probabilities between 0 and 1 with the same sum, far from `best` and near to it."""
    generator = np.random.default_rng(seed)
    for noise in (0.01, 0.1, 1.0):
        found = best + generator.normal(0, noise, (300, len(best)))
        for _ in range(60):  # alternating projections
            found = (found + (budget - found.sum(1, keepdims=True)) / len(best)).clip(0, 1)
        yield found[np.abs(found.sum(1) - budget) < 1e-9]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 2, 5, 8])
@pytest.mark.parametrize("wrong", [0, 1, 3, 8])
def test_no_other_sample_has_a_larger_smallest_gain(budget, wrong, seed):
    gains = -np.sort(-draws(seed, 9))
    found = robust_probabilities(gains, budget, wrong)
    assert found.sum() == pytest.approx(budget, abs=1e-8)
    assert (found >= 0).all()
    assert (found <= 1).all()
    best = value(found, gains, wrong)
    for other in others(found, budget, seed):
        assert value(other, gains, wrong).max(initial=0) <= best + 1e-8
    if budget == 1:
        wanted = published(gains, wrong)
        assert best == pytest.approx(value(wanted, gains, wrong), rel=1e-9)
        assert found == pytest.approx(wanted, abs=1e-8)


def test_known_probabilities():
    gains = -np.sort(-draws(0))
    assert robust_probabilities(gains, 3, 0).tolist() == [1.0] * 3 + [0.0] * 37
    assert robust_probabilities(np.full(8, 0.3), 2, 2) == pytest.approx(np.full(8, 0.25))
    assert (robust_probabilities(gains, 1, 39) > 0).all()
    assert robust_probabilities(gains, 40, 5) == pytest.approx(np.ones(40))


def test_samples_have_their_size_and_their_probabilities():
    wanted = robust_probabilities(-np.sort(-draws(2, 10)), 4, 5)
    assert (wanted > 0).sum() > 4
    counts, generator = np.zeros(10), np.random.default_rng(0)
    for _ in range(4000):
        places = sampled(wanted, generator)
        assert len(set(places.tolist())) == 4
        counts[places] += 1
    spread = np.sqrt(wanted * (1 - wanted) / 4000)
    assert (np.abs(counts / 4000 - wanted) <= 4.5 * spread + 1e-12).all()


def test_a_robust_choice():
    gains = draws(3, 200)
    gains[[5, 90]] = 0, np.nan
    chosen = robust(gains, 30, 0.2, seed=1)
    assert len(set(chosen.tolist())) == 30
    assert chosen.tolist() == sorted(chosen.tolist())
    assert not {5, 90} & {*chosen.tolist()}
    assert np.array_equal(chosen, robust(gains, 30, 0.2, seed=1))
    assert not np.array_equal(chosen, robust(gains, 30, 0.2, seed=2))
    top = np.argsort(-np.nan_to_num(gains), kind="stable")
    assert set(robust(gains, 30, 0.0, seed=1).tolist()) == set(top[:30].tolist())
    assert len(robust(gains, 500, 0.2, seed=1)) == 198
    with pytest.raises(NothingToChooseByError):
        robust(np.zeros(3), 1, 0.1, seed=0)


# Groups and bounds


@pytest.mark.parametrize(("quantile", "size"), [(0.0, 2), (0.5, 5), (0.75, 8), (1.0, 12)])
def test_groups_get_one_size(quantile, size):
    groups = ["a"] * 12 + [None] * 3 + ["b"] * 4 + [7] * 6 + ["c"] * 2
    assert round(float(np.quantile([12, 4, 6, 2], quantile))) == size
    places = balanced(groups, quantile, seed=4)
    assert places.tolist() == sorted(places.tolist())
    assert Counter(groups[p] for p in places) == dict.fromkeys(["a", "b", 7, "c"], size)
    for group in ("a", "b", 7, "c"):
        own = [p for p, g in enumerate(groups) if g == group]
        counts = [Counter(places.tolist())[p] for p in own]
        assert max(counts) - min(counts) <= 1
    assert np.array_equal(places, balanced(groups, quantile, seed=4))


def test_the_largest_number_is_in_the_last_interval():
    values = [0, 2.4, 2.6, 10, 7.5, "7", True, None, float("nan")]
    assert binned(values, 4) == [0, 0, 1, 3, 3, None, None, None, None]
    assert binned([3, 3.0], 5) == [0, 0]


def test_bounds_are_exclusive():
    assert between(np.array([0, 0.25, 1, np.nan, 0.99]), 0.0, 1.0).tolist() == [1, 4]
