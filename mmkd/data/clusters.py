"""k-means: groups of records whose images have similar features.

Written here because no library that mmkd depends on has it, and clusters must not depend on whether
scipy or scikit-learn is installed. These also start from the order of the points.
"""

from collections.abc import Sequence

import numpy as np

MOST_ROUNDS = 300
ROWS = 2048
"""Points whose distances are in memory at once."""


class TooFewPointsError(ValueError):
    """There are fewer different points than clusters."""


def clusters(points: np.ndarray, keys: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The cluster of each point, [N] int64, from 0.

    Clusters are numbered by size, the largest first; of equal ones, that with the smallest key. The
    order of the points does not matter.

    Args:
        points: [N, D], of any dtype; all sums are float64.
        keys: of the points; points with equal keys are equal up to rounding.
        count: number of clusters.
        seed: of the first centres.

    Raises:
        TooFewPointsError: there are fewer different points than clusters.
    """
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    ordered = points[order]
    labels = lloyd(ordered, first_centres(ordered, count, np.random.default_rng(seed)))
    sizes = np.bincount(labels, minlength=count)
    firsts = [int(np.argmax(labels == cluster)) for cluster in range(count)]
    ranked = sorted(range(count), key=lambda cluster: (-sizes[cluster], firsts[cluster]))
    number = np.empty(count, np.int64)
    number[ranked] = np.arange(count)
    found = np.empty(len(points), np.int64)
    found[order] = number[labels]
    return found


def first_centres(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Points that are far from each other, [count, D] float64, by k-means++ (Arthur and
    Vassilvitskii 2007): each is drawn in proportion to its squared distance to those before it.

    Raises:
        TooFewPointsError: there are fewer different points.
    """
    chosen = points[generator.integers(len(points))][None].astype(np.float64)
    nearest = _distances(points, chosen)[:, 0]
    while len(chosen) < count:
        sums = np.cumsum(nearest)
        if not sums[-1] > 0:
            raise TooFewPointsError(f"fewer are different, {len(chosen):,}")
        place = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
        new = points[min(place, int(np.flatnonzero(nearest)[-1]))][None].astype(np.float64)
        nearest = np.minimum(nearest, _distances(points, new)[:, 0])
        chosen = np.concatenate([chosen, new])
    return chosen


def lloyd(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre of each point, [N] int64, after Lloyd's rounds: points choose the nearest
    centre, and centres become the means of their points. A centre without points moves to the point
    that is farthest from its own centre.

    Args:
        points: [N, D].
        centres: [K, D] float64, at the beginning.
    """
    labels = np.full(len(points), -1)
    for _ in range(MOST_ROUNDS):
        distances = _distances(points, centres)
        found = distances.argmin(1)
        far = distances.min(1)
        for empty in np.flatnonzero(np.bincount(found, minlength=len(centres)) == 0):
            several = np.bincount(found, minlength=len(centres))[found] > 1
            farthest = int(np.where(several, far, -1.0).argmax())
            found[farthest], far[farthest] = empty, 0.0
        if (found == labels).all():
            break
        labels = found
        centres = np.stack(
            [points[labels == k].mean(0, dtype=np.float64) for k in range(len(centres))]
        )
    return labels


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances, [N, K] float64; 0 for equal rows."""
    found = np.empty((len(points), len(centres)))
    for start in range(0, len(points), ROWS):
        part = points[start : start + ROWS].astype(np.float64)
        for k, centre in enumerate(centres):
            found[start : start + ROWS, k] = np.square(part - centre).sum(1)
    return found
