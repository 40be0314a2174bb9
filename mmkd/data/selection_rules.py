"""Formulas that choose records by numbers. They are functions of their arguments only.

All of them return places in the arrays that they are given, ascending, so that the chosen records
keep the order of the data. A record without a number (NaN) is never chosen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SAME = 1e-6
"""Differences of losses in nats that are no more than this are rounding."""
TINY = 1e-9
"""Probabilities below it are rounding."""


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


def robust_probabilities(gains: np.ndarray, budget: int, wrong: float) -> np.ndarray:
    """Probabilities of including each record in a robust sample of `budget` records, [n] float64.

    A teacher answers `wrong` of n records incorrectly, and an adversary decides which. The
    probabilities p maximise the smallest expected gain of the records that are answered correctly,
    over all p with 0 <= p_i <= 1 and sum p = budget:

        max_p min_{|W| <= wrong} sum_{i not in W} p_i g_i
          = max_{p, t} sum_i min(p_i g_i, t) - wrong t

    For a given t, the best p fills the budget in order of gain with p_i = min(1, t / g_i). The
    value is concave in t. Without a p_i at its bound 1, this is the solution of Robust Active
    Distillation (arXiv 2210.01213) with gains g_1 >= ... >= g_n, times the budget:

        k = argmax_k (k - wrong) / sum_{i <= k} 1 / g_i
        p_i = budget (1 / g_i) / sum_{j <= k} 1 / g_j    for i <= k, else 0

    Args:
        gains: [n] float64, positive, descending.
        budget: number of records, at most n.
        wrong: number of incorrect answers, below n.
    """
    costs = np.concatenate([[0.0], np.cumsum(1 / gains)])
    low, high = 0.0, float(gains[0])
    while (middle := (low + high) / 2) not in (low, high):
        if _slope(gains, costs, budget, wrong, middle) > 0:
            low = middle
        else:
            high = middle
    found = np.minimum(1.0, high / gains)
    totals = np.cumsum(found)
    last = int(np.searchsorted(totals, budget))  # the budget ends at this record
    if last < len(gains):
        before = totals[last - 1] if last else 0.0
        found[last] = budget - before
        found[last + 1 :] = 0.0
        found[found < TINY] = 0.0
    elif (free := 1 - found).sum() > 0:  # what is left of the budget does not change the value
        found += free * (budget - totals[-1]) / free.sum()
    return found.clip(0.0, 1.0)


def _slope(gains: np.ndarray, costs: np.ndarray, budget: int, wrong: float, t: float) -> float:
    """Slope in t of the value of `robust_probabilities`.

    Args:
        gains, budget, wrong: as there.
        costs: sums of the first 0, 1, ..., n of 1 / gains.
        t: between two points at which the slope changes.
    """
    above = int(np.searchsorted(-gains, -t))  # number of gains above t
    if t * costs[above] >= budget:
        count = int(np.searchsorted(costs, budget / t, side="right")) - 1
        return count - gains[min(count, len(gains) - 1)] * costs[count] - wrong
    last = above + int(budget - t * costs[above])  # the record at which the budget ends
    if last >= len(gains):
        return above - wrong
    return above - gains[last] * costs[above] - wrong


def sampled(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random sample without replacement, by systematic sampling in a random order.

    Each place is included with exactly its probability, and each sample has the same size.

    Args:
        probabilities: [k] float64, between 0 and 1, with an integer sum.
        generator: source of random numbers.

    Returns:
        Places, ascending.
    """
    certain = np.flatnonzero(probabilities >= 1 - TINY)
    order = generator.permutation(np.flatnonzero(probabilities < 1 - TINY))
    count = round(float(probabilities.sum())) - len(certain)
    if count <= 0:
        return np.sort(certain)
    ends = np.cumsum(probabilities[order])
    ends *= count / ends[-1]
    drawn = order[np.searchsorted(ends, generator.random() + np.arange(count), side="right")]
    return np.sort(np.concatenate([certain, drawn]))


def robust(gains: np.ndarray, budget: int, wrong: float, seed: int) -> np.ndarray:
    """Places of a robust choice of `budget` records, drawn with `robust_probabilities`.

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
    count = min(budget, len(order))
    found = robust_probabilities(gains[order], count, wrong * len(order))
    return np.sort(order[sampled(found, np.random.default_rng(seed))])


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
