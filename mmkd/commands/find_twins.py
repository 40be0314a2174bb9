"""Twins of training images, and texts that occur again, in held-out records and in tasks."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmkd.data.check import Findings
from mmkd.data.fingerprints import asked_keys
from mmkd.data.overlap import question_keys, run_keys
from mmkd.data.records import Source
from mmkd.data.twins import as_array, connected, near_pairs
from mmkd.evaluation.documents import Document, TaskDocuments

TRAINING, HELD_OUT = "training", "held out"
COMMON, COMMON_SHARE = 10, 0.05
"""A run of words that occurs in more documents of a task, and in a larger share of them, is part of
a prompt template and is not compared."""

Place = tuple[int, int]
"""Number of a source, and index of a record in it."""


@dataclass
class Side:
    """Something that training records are compared with: held-out records, or a task.

    Attributes:
        places: {hash: the records or documents that show an image with it}.
        texts: {key: documents with this text}, for training records without images.
        documents: of a task.
        unreadable, thumbnails: as in `TaskDocuments`.
    """

    name: str
    count: int = 0
    held_out: bool = False
    places: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    documents: Sequence[Document] = ()
    unreadable: Sequence[str] = ()
    thumbnails: Mapping[int, Any] = field(default_factory=dict)


def task_sides(tasks: Iterable[TaskDocuments]) -> list[Side]:
    """A side for each task."""
    return [_task_side(task) for task in tasks]


def _task_side(task: TaskDocuments) -> Side:
    side = Side(
        task.task,
        len(task.documents) + len(task.unreadable),
        documents=task.documents,
        unreadable=task.unreadable,
        thumbnails=task.thumbnails,
    )
    for number, document in enumerate(task.documents):
        for value in dict.fromkeys(document.hashes):
            side.places[value].append(number)
        keys = run_keys(document.question).tolist()
        if not document.hashes:
            keys += question_keys(document.question)
        for key in keys:
            side.texts[key].add(number)
    most = max(COMMON, COMMON_SHARE * side.count)
    side.texts = {key: shown for key, shown in side.texts.items() if len(shown) <= most}
    return side


def wanted_texts(sides: Iterable[Side]) -> np.ndarray:
    """The text keys of all sides, [n] uint64, ascending and different."""
    return np.unique(np.array([key for side in sides for key in side.texts], dtype=np.uint64))


@dataclass
class Training:
    """Training records of all sources.

    Attributes:
        sources: open sources; they contain the records that are left out too.
        trained: for each source, whether a record is trained on, [records] bool.
        places: {hash: the records that show an image with it}.
    """

    sources: list[Source]
    trained: list[np.ndarray]
    places: dict[int, list[Place]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[int, list[Place]] = field(default_factory=lambda: defaultdict(list))
    repeated: int = 0

    def where(self, place: Place) -> str:
        return self.sources[place[0]].where(place[1])


def divide(
    found: Sequence[Findings], trained: list[np.ndarray], held_out: list[np.ndarray]
) -> tuple[Training, Side]:
    """Divide the fingerprints of sources into those of training and of held-out records.

    Args:
        found: results of checking the sources.
        trained, held_out: for each source, the records of either kind, [records] bool.
    """
    training = Training([Source(f.source, whole=True) for f in found], trained)
    side = Side(HELD_OUT, int(sum(mask.sum() for mask in held_out)), held_out=True)
    seen: set[int] = set()
    for number, one in enumerate(found):
        prints = one.fingerprints
        for index, value in prints.images:
            place = (number, index)
            if trained[number][index] and place not in training.places[value][-1:]:
                training.places[value].append(place)
            if held_out[number][index] and place not in side.places[value][-1:]:
                side.places[value].append(place)
        for index, key in prints.texts:
            if trained[number][index]:
                training.texts[key].append((number, index))
        own = [key for index, key in prints.whole if trained[number][index]]
        training.repeated += len(own) - len({*own} - seen)
        seen.update(own)
    return training, side


@dataclass
class Pair:
    """An image of a side, and its twins among the training images.

    Attributes:
        value: hash of the side's image.
        bits: distance of the nearest twin.
        of: the side's records or documents with this image.
        training: training records with its twins, the nearest first.
        nearest: hash of the nearest twin.
        asked: the records or documents whose question a twin's record asks too.
    """

    value: int
    bits: int
    of: list[Any]
    training: list[Place]
    nearest: int
    asked: list[Any]


@dataclass
class Group:
    """Training images with different hashes, each a twin of another one.

    Attributes:
        values: their hashes.
        bits: distance of the two that are nearest to each other.
        nearest: hashes of these two.
    """

    values: list[int]
    bits: int
    nearest: tuple[int, int]


@dataclass
class Twins:
    """Results of a comparison.

    Attributes:
        groups: twins within training, the nearest first.
        pairs: twins between training and each side, in the order of the sides.
        texts: for each side, {document: training records without images that share its text}.
    """

    bits: int
    training: Training
    sides: list[Side]
    groups: list[Group]
    pairs: list[list[Pair]]
    texts: list[dict[int, list[Place]]]

    def left_out(self) -> dict[Place, str]:
        """Training records with a twin or a text of a side, with the reason."""
        found: dict[Place, str] = {}
        for side, pairs, texts in zip(self.sides, self.pairs, self.texts, strict=True):
            for pair in pairs:
                name = self.name(side, pair.of[0])
                for place in pair.training:
                    found.setdefault(place, f"{side.name}: image of {name}")
            for document, places in texts.items():
                for place in places:
                    found.setdefault(place, f"{side.name}: text of {self.name(side, document)}")
        return dict(sorted(found.items()))

    def name(self, side: Side, place: Any) -> str:
        """A record or a document of a side, for messages."""
        if side.held_out:
            return self.training.where(place)
        return side.documents[place].name


def compare(training: Training, sides: Sequence[Side], bits: int) -> Twins:
    """Find twins within the training images, and between them and each side.

    Args:
        training: the training records.
        sides: held-out records and tasks.
        bits: most bits in which twins differ.

    Raises:
        DataError: there are too many pairs, see `near_pairs`.
    """
    values = list(dict.fromkeys([*training.places, *(v for s in sides for v in s.places)]))
    left, right, distance = near_pairs(as_array(values), bits)
    near: dict[int, list[tuple[int, int]]] = {}
    for a, b, d in zip(left.tolist(), right.tolist(), distance.tolist(), strict=True):
        near.setdefault(a, []).append((d, b))
        near.setdefault(b, []).append((d, a))
    trained = [value in training.places for value in values]
    number = {value: i for i, value in enumerate(values)}
    pairs = []
    for side in sides:
        own = []
        for value in side.places:
            index = number[value]
            twins = sorted((d, i) for d, i in [(0, index), *near.get(index, [])] if trained[i])
            if twins:
                own.append(_pair(training, side, value, [(d, values[i]) for d, i in twins]))
        pairs.append(sorted(own, key=lambda pair: pair.bits))
    texts = [_shared(training, side) for side in sides]
    edges = zip(left.tolist(), right.tolist(), distance.tolist(), strict=True)
    within = [edge for edge in edges if trained[edge[0]] and trained[edge[1]]]
    return Twins(bits, training, list(sides), _groups(values, within), pairs, texts)


def _groups(values: list[int], pairs: list[tuple[int, int, int]]) -> list[Group]:
    """Groups of twins.

    Args:
        values: hashes.
        pairs: indices of two hashes, and their distance.
    """
    numbers = {i: n for n, i in enumerate(sorted({i for a, b, _ in pairs for i in (a, b)}))}
    shown = [*numbers]
    edges = [(numbers[a], numbers[b]) for a, b, _ in pairs]
    groups = connected(len(shown), iter(edges))
    group_of = {shown[k]: g for g, group in enumerate(groups) for k in group}
    nearest: dict[int, tuple[int, int, int]] = {}
    for a, b, d in pairs:
        nearest[group_of[a]] = min(nearest.get(group_of[a], (d, a, b)), (d, a, b))
    found = [
        Group([values[shown[k]] for k in group], d, (values[a], values[b]))
        for g, group in enumerate(groups)
        for d, a, b in [nearest[g]]
    ]
    return sorted(found, key=lambda group: group.bits)


def _pair(training: Training, side: Side, value: int, twins: list[tuple[int, int]]) -> Pair:
    places = list(dict.fromkeys(p for _, twin in twins for p in training.places[twin]))
    keys = {key for place in places for key in _asked(training, place)}
    of = side.places[value]
    asked = [place for place in of if not keys.isdisjoint(_asked_of(training, side, place))]
    return Pair(value, twins[0][0], of, places, twins[0][1], asked)


def _asked(training: Training, place: Place) -> set[int]:
    return asked_keys(training.sources[place[0]][place[1]])


def _asked_of(training: Training, side: Side, place: Any) -> set[int]:
    if side.held_out:
        return _asked(training, place)
    return question_keys(side.documents[place].question)


def _shared(training: Training, side: Side) -> dict[int, list[Place]]:
    found: dict[int, set[Place]] = defaultdict(set)
    for key in training.texts.keys() & side.texts.keys():
        for document in side.texts[key]:
            found[document].update(training.texts[key])
    return {document: sorted(places) for document, places in sorted(found.items())}
