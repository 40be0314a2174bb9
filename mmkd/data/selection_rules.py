"""Formulas that choose records by numbers. They are functions of their arguments only.

All of them return places in the arrays that they are given, ascending, so that the chosen records
keep the order of the data. A record without a number (NaN) is never chosen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SAME = 1e-6
"""Differences of losses in nats that are no more than this are rounding."""


class NothingToChooseByError(ValueError):
    """The numbers of all records are the same."""


def count_of(share: float, records: int) -> int:
    """Number of records of a share, rounded, at least one."""
    return max(1, round(share * records))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values, [count] int64; of equal values, those that come first.

    Args:
        values: [N] float64.
        count: number of values; fewer are returned if there are fewer numbers.

    Raises:
        NothingToChooseByError: all numbers are the same up to rounding.
    """
    known = np.flatnonzero(~np.isnan(values))
    if len(known) == 0 or np.ptp(values[known]) <= SAME:
        raise NothingToChooseByError("all values are the same")
    order = known[np.argsort(-values[known], kind="stable")]
    return np.sort(order[:count])


def robust_support(gains: np.ndarray, wrong: float) -> int:
    """Number of records among which the robust choice is made.

    A teacher answers `wrong` of n records incorrectly, and an adversary decides which. The
    distribution q over the records that maximises the smallest expected gain of the records that
    are answered correctly is, with gains g_1 >= ... >= g_n (Robust Active Distillation, arXiv
    2210.01213):

        k = argmax_k (k - wrong) / sum_{i <= k} 1 / g_i
        q_i = (1 / g_i) / sum_{j <= k} 1 / g_j    for i <= k, else 0

    Args:
        gains: [n] float64, positive, descending.
        wrong: number of incorrect answers, below n.

    Returns:
        k; of several, the largest.
    """
    sizes = np.arange(1, len(gains) + 1)
    values = (sizes - wrong) / np.cumsum(1 / gains)
    best = values.max()
    return int(np.flatnonzero(values >= best - 1e-12 * abs(best))[-1]) + 1


def inclusion(gains: np.ndarray, budget: int) -> np.ndarray:
    """Probabilities of including each record in a sample of `budget` records, [k] float64.

    They are proportional to 1 / gain and at most 1, so a record with probability 1 is in every
    sample: min(1, c / g_i), with c such that they sum to `budget`.

    Args:
        gains: [k] float64, positive, descending.
        budget: number of records, at most k.
    """
    weights = 1 / gains
    # Ascending weights: the last ones reach 1 first.
    totals = np.cumsum(weights)
    full = 0  # the number of probabilities that are 1
    while full < budget:
        factor = (budget - full) / totals[len(gains) - full - 1]
        if factor * weights[len(gains) - full - 1] < 1:
            return np.minimum(1.0, factor * weights)
        full += 1
    found = np.zeros(len(gains))
    found[len(gains) - budget :] = 1.0
    return found


def sampled(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random sample without replacement, by systematic sampling in a random order.

    Each place is included with exactly its probability, and each sample has the same size.

    Args:
        probabilities: [k] float64, between 0 and 1, with an integer sum.
        generator: source of random numbers.

    Returns:
        Places, ascending.
    """
    certain = np.flatnonzero(probabilities >= 1)
    order = generator.permutation(np.flatnonzero(probabilities < 1))
    count = round(float(probabilities.sum())) - len(certain)
    if count <= 0:
        return np.sort(certain)
    ends = np.cumsum(probabilities[order])
    ends *= count / ends[-1]
    drawn = order[np.searchsorted(ends, generator.random() + np.arange(count), side="right")]
    return np.sort(np.concatenate([certain, drawn]))


def robust(gains: np.ndarray, budget: int, wrong: float, seed: int) -> np.ndarray:
    """Places of a robust choice of `budget` records.

    The sample is drawn from the `robust_support` with probabilities proportional to those of q. If
    it has fewer than `budget` records, the next ones in order of gain are added to it.

    Args:
        gains: [N] float64, the gain of a correct answer to each record. Records whose gain is 0 or
            NaN are never chosen.
        budget: number of records; all records with a gain if there are fewer.
        wrong: share of the records that the teacher answers incorrectly, in [0, 1).
        seed: of the sample.

    Raises:
        NothingToChooseByError: no record has a gain.
    """
    known = np.flatnonzero(gains > 0)  # False for NaN
    if len(known) == 0:
        raise NothingToChooseByError("no record has a gain")
    order = known[np.argsort(-gains[known], kind="stable")]
    support = max(robust_support(gains[order], wrong * len(order)), min(budget, len(order)))
    chosen = order[:support]
    found = inclusion(gains[chosen], min(budget, support))
    return np.sort(chosen[sampled(found, np.random.default_rng(seed))])


def binned(values: Sequence[Any], bins: int) -> list[int | None]:
    """The interval of each number, of `bins` equal intervals from the smallest to the largest
    number. The largest number belongs to the last interval. None for anything but a number.

    Args:
        values: [N], of which at least one is a number.
        bins: number of intervals.
    """
    numbers = np.array([v if is_number(v) else np.nan for v in values], np.float64)
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    width = (high - low) / bins
    return [
        None if np.isnan(x) else 0 if width == 0 else min(int((x - low) / width), bins - 1)
        for x in numbers.tolist()
    ]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def balanced(groups: Sequence[Any], quantile: float, seed: int) -> np.ndarray:
    """Places with groups of equal size.

    The size is a quantile of the groups' sizes, rounded. A larger group is cut at random. Records
    of a smaller one are repeated: all equally often, up to one time, which is decided at random.

    Args:
        groups: [N], the group of each record, as text or number; None for no group.
        quantile: between 0 and 1.
        seed: of the random choice.

    Returns:
        Places, ascending, of which some may occur several times.
    """
    members: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(place)
    size = max(1, round(float(np.quantile([len(m) for m in members.values()], quantile))))
    generator = np.random.default_rng(seed)
    parts = []
    for own in members.values():
        whole, rest = divmod(size, len(own))
        parts += [np.repeat(own, whole), generator.permutation(own)[:rest]]
    return np.sort(np.concatenate(parts))


def between(values: np.ndarray, least: float, most: float) -> np.ndarray:
    """Places of the numbers above `least` and below `most`."""
    with np.errstate(invalid="ignore"):
        return np.flatnonzero((values > least) & (values < most))
