"""What is on one picture: objects with class, card colour, asset and box, or a digit string.

Scenes come from a fixed `World`: classes differ in popularity, and every class has a few
companions it is often seen with. Without that skew "adversarial" negatives would be random ones
(POPE, arXiv 2305.10355, section 4.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mmkd.data.scenes.vocabulary import BY_NAME, CLASSES, COLOURS, held_out_colour

CANVAS = 64
WORLD_SEED = 17
COMPANIONS_PER_CLASS = 4
COMPANION_SHARE = 0.6
REPEAT_SHARE = 0.12


@dataclass(frozen=True)
class SceneObject:
    """One object: `box` is (left, top, right, bottom) in pixels of the canvas."""

    name: str
    colour: str
    asset: str
    box: tuple[int, int, int, int]

    @property
    def group(self) -> str:
        return BY_NAME[self.name].group

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """Objects sorted from left to right; `digits` is the number on the sign, if there is one."""

    objects: tuple[SceneObject, ...]
    background: int
    digits: str | None = None
    digit_boxes: tuple[tuple[int, int, int, int], ...] = ()
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(o.name for o in self.objects))


@dataclass(frozen=True)
class World:
    """Class popularity [C] and companionship [C, C] (rows sum to 1)."""

    popularity: np.ndarray
    companions: np.ndarray


@lru_cache(maxsize=1)
def world() -> World:
    """The one world that all splits and seeds share."""
    rng = np.random.default_rng(WORLD_SEED)
    count = len(CLASSES)
    rank = rng.permutation(count)
    popularity = 1.0 / (rank + 6.0)
    companions = np.zeros((count, count))
    for i, cls in enumerate(CLASSES):
        others = [j for j in range(count) if CLASSES[j].group != cls.group]
        friends = rng.choice(others, COMPANIONS_PER_CLASS, replace=False)
        companions[i, friends] = 1.0 / COMPANIONS_PER_CLASS
    return World(popularity / popularity.sum(), companions)


@dataclass(frozen=True)
class Split:
    """Which scenes a split may show; `number` keeps the splits' random streams apart."""

    name: str
    number: int
    held_out_colours: bool = False
    held_out_assets: bool = False


SPLITS: dict[str, Split] = {
    s.name: s
    for s in (
        Split("train", 0),
        Split("validation", 1),
        Split("test", 2),
        Split("test_attributes", 3, held_out_colours=True),
        Split("test_assets", 4, held_out_assets=True),
    )
}


def scene_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random stream of scene `index`: independent of every other scene and split."""
    return np.random.default_rng(np.random.SeedSequence((seed, split.number, index)))


def sample_scene(rng: np.random.Generator, split: Split, *, distinct: int | None = None) -> Scene:
    """Draw one scene.

    Args:
        rng: the scene's own random stream.
        split: decides between training and held-out colours and assets.
        distinct: ask for exactly this many objects, all of different classes, and no digits
            (POPE pictures). Otherwise 1 to 4 objects, or a digit string with up to one object.
    """
    background = int(rng.integers(5))
    if distinct is None and rng.random() < 0.15:
        return _sample_digits(rng, split, background)
    count = distinct or int(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15]))
    names = _sample_names(rng, split, count, repeats=distinct is None)
    return Scene(_place(rng, split, names, top=0), background)


def _sample_digits(rng: np.random.Generator, split: Split, background: int) -> Scene:
    length = int(rng.integers(2, 5))
    digits = "".join(str(d) for d in rng.integers(0, 10, length))
    size = 15
    left = int(rng.integers(1, CANVAS - size * length))
    top = int(rng.integers(1, 10))
    boxes = tuple((left + i * size, top, left + (i + 1) * size, top + size) for i in range(length))
    names = _sample_names(rng, split, int(rng.integers(0, 2)), repeats=False)
    return Scene(_place(rng, split, names, top=top + size + 1), background, digits, boxes)


def _sample_names(
    rng: np.random.Generator, split: Split, count: int, *, repeats: bool
) -> list[str]:
    allowed = np.array([bool(c.held_out) or not split.held_out_assets for c in CLASSES], float)
    names: list[str] = []
    while len(names) < count:
        if names and repeats and rng.random() < REPEAT_SHARE:
            names.append(names[int(rng.integers(len(names)))])
            continue
        weights = world().popularity * allowed
        if names and rng.random() < COMPANION_SHARE:
            anchor = [c.name for c in CLASSES].index(names[int(rng.integers(len(names)))])
            friends = world().companions[anchor] * allowed
            weights = friends if friends.sum() > 0 else weights
        name = CLASSES[int(rng.choice(len(CLASSES), p=weights / weights.sum()))].name
        if name not in names:
            names.append(name)
    return names


def _place(
    rng: np.random.Generator, split: Split, names: Sequence[str], *, top: int
) -> tuple[SceneObject, ...]:
    low, high = (23, 30) if len(names) <= 2 else (21, 27)
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(60):
            if len(boxes) == len(names):
                break
            size = int(rng.integers(low, high + 1))
            left = int(rng.integers(0, CANVAS - size + 1))
            upper = int(rng.integers(top, CANVAS - size + 1))
            box = (left, upper, left + size, upper + size)
            if all(_apart(box, other) for other in boxes):
                boxes.append(box)
        if len(boxes) == len(names):
            break
    objects = [
        SceneObject(name, _colour(rng, split, name), _asset(rng, split, name), box)
        for name, box in zip(names, boxes, strict=True)
    ]
    return tuple(sorted(objects, key=lambda o: (o.centre[0], o.centre[1])))


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def _colour(rng: np.random.Generator, split: Split, name: str) -> str:
    if split.held_out_colours:
        return held_out_colour(name)
    choices = [c for c in COLOURS if c != held_out_colour(name)]
    return choices[int(rng.integers(len(choices)))]


def _asset(rng: np.random.Generator, split: Split, name: str) -> str:
    cls = BY_NAME[name]
    assets = cls.held_out if split.held_out_assets else cls.assets
    return assets[int(rng.integers(len(assets)))]
