"""k-means against its definition, and what it must not depend on."""

import numpy as np
import pytest

from mmkd.data import clusters as module
from mmkd.data.clusters import TooFewPointsError, clusters, first_centres, lloyd


@pytest.fixture
def points():
    generator = np.random.default_rng(1)
    centres = 4 * generator.normal(size=(5, 7))
    own = centres[generator.integers(5, size=400)] + generator.normal(size=(400, 7))
    return own.astype(np.float32)


KEYS = [f"{n * 7919 % 400:03d}" for n in range(400)]


def twin(points, centres):
    """Lloyd's rounds, point by point in float64."""
    points, labels = points.astype(np.float64), None
    while True:
        found = [min(range(len(centres)), key=lambda k: ((p - centres[k]) ** 2).sum())
                 for p in points]  # fmt: skip
        if found == labels:
            return labels
        labels = found
        centres = [
            np.sum([p for p, k in zip(points, labels, strict=True) if k == c], axis=0)
            / labels.count(c)
            for c in range(len(centres))
        ]


def test_the_same_start_gives_the_labels_of_the_definition(points, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 33)
    for seed in range(4):
        centres = first_centres(points, 5, np.random.default_rng(seed))
        assert len(np.unique(centres, axis=0)) == 5
        assert lloyd(points, centres).tolist() == twin(points, list(centres))


def test_the_order_of_the_points_changes_no_label(points):
    labels = clusters(points, KEYS, 5, 3)
    order = np.random.default_rng(2).permutation(len(points))
    assert (clusters(points[order], [KEYS[i] for i in order], 5, 3) == labels[order]).all()
    assert (clusters(points, KEYS, 5, 3) == labels).all()
    sizes = np.bincount(labels).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert (len(sizes), sum(sizes)) == (5, 400)
    assert not clusters(points, KEYS, 1, 3).any()


def test_centres_without_points_move(points):
    far = np.full((2, 7), 1e6)
    labels = lloyd(points, np.concatenate([points[:2].astype(np.float64), far]))
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_fewer_points_than_clusters():
    same = np.repeat(np.eye(3), 4, axis=0)
    keys = [str(n) for n in range(12)]
    assert np.bincount(clusters(same, keys, 3, 0)).tolist() == [4, 4, 4]
    with pytest.raises(TooFewPointsError, match="fewer are different, 3"):
        clusters(same, keys, 4, 0)
