"""Language about a scene: questions with answers from ground truth, captions, preference pairs.

Every question kind has several wordings; answers are short and exact, so that scores need no judge.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmkd.data.scenes.scene import Scene, SceneObject
from mmkd.data.scenes.vocabulary import BY_GROUP, CLASSES, GROUPS

CAPTION_WORDINGS = ("Describe the picture.", "What do you see?", "Write a caption.")
EXISTENCE_WORDINGS = (
    "Is there {a} {x} in the picture?",
    "Do you see {a} {x}?",
    "Does the picture show {a} {x}?",
)
COUNT_WORDINGS = ("How many {xs} are there?", "Count the {xs}.", "How many {xs} do you see?")
RELATION_WORDINGS = (
    "Is the {x} {relation} the {y}?",
    "Would you say that the {x} is {relation} the {y}?",
    "Look at the {x}. Is it {relation} the {y}?",
)
COLOUR_WORDINGS = (
    "What colour is the card of the {x}?",
    "Which colour is behind the {x}?",
    "The {x} is on a card of which colour?",
)
NAME_WORDINGS = (
    "What is on the {colour} card?",
    "Which object has the {colour} card?",
    "Name the object on the {colour} card.",
)
CATEGORY_WORDINGS = (
    "What kind of thing is on the {colour} card?",
    "Which group does the object on the {colour} card belong to?",
    "The object on the {colour} card is a kind of what?",
)
CHOICE_WORDINGS = (
    "Which of these is in the picture?",
    "Choose what the picture shows.",
    "Which one do you see?",
)
OCR_WORDINGS = ("What number is shown?", "Read the number.", "Which digits do you see?")

RELATIONS = ("left of", "right of", "above", "below")
LETTERS = "ABCD"
MIN_OFFSET = 10  # pixels between centres below which a relation would be a matter of taste


@dataclass(frozen=True)
class Question:
    """One exchange: `kind` is the column of the score table it counts in."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Statistics:
    """How often classes appear (popular negatives) and co-occur (adversarial negatives).

    `frequency` is [C], `cooccurrence` is [C, C], both counted on training scenes.
    """

    frequency: np.ndarray
    cooccurrence: np.ndarray

    @classmethod
    def count(cls, scenes: Sequence[Scene]) -> "Statistics":
        index = {c.name: i for i, c in enumerate(CLASSES)}
        frequency = np.zeros(len(CLASSES))
        together = np.zeros((len(CLASSES), len(CLASSES)))
        for scene in scenes:
            present = sorted({index[n] for n in scene.names})
            frequency[present] += 1
            for i in present:
                for j in present:
                    together[i, j] += i != j
        return cls(frequency, together)


def negatives(
    rng: np.random.Generator, scene: Scene, statistics: Statistics, kind: str, count: int
) -> list[str]:
    """Absent classes to ask about: `random`, `popular` or `adversarial` (arXiv 2305.10355, 4.1)."""
    absent = [i for i, c in enumerate(CLASSES) if c.name not in scene.names]
    chosen: list[int]
    if kind == "random":
        chosen = [int(i) for i in rng.choice(absent, count, replace=False)]
    elif kind == "popular":
        chosen = sorted(absent, key=lambda i: -statistics.frequency[i])[:count]
    elif kind == "adversarial":
        present = [i for i, c in enumerate(CLASSES) if c.name in scene.names]
        score = statistics.cooccurrence[present].sum(0)
        chosen = sorted(absent, key=lambda i: (-score[i], -statistics.frequency[i]))[:count]
    else:
        raise ValueError(f"unknown kind of negatives: {kind!r}")
    return [CLASSES[i].name for i in chosen]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def caption(scene: Scene, names: Sequence[str] | None = None) -> str:
    """The true caption, objects from left to right; `names` replaces the object words."""
    words = names or scene.names
    parts = [f"the number {scene.digits}"] if scene.digits else []
    parts += [
        f"{article(n)} {n} on {article(o.colour)} {o.colour} card"
        for n, o in zip(words, scene.objects, strict=True)
    ]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def ask_existence(rng: np.random.Generator, name: str, present: bool, kind: str) -> Question:
    text = _pick(rng, EXISTENCE_WORDINGS).format(a=article(name), x=name)
    return Question(kind, text, "yes" if present else "no")


def ask_caption(rng: np.random.Generator, scene: Scene) -> Question:
    return Question("caption", _pick(rng, CAPTION_WORDINGS), caption(scene))


def _unique(scene: Scene) -> list[SceneObject]:
    times = Counter(scene.names)
    return [o for o in scene.objects if times[o.name] == 1]


def _sole_colour(scene: Scene) -> list[SceneObject]:
    times = Counter(o.colour for o in scene.objects)
    return [o for o in scene.objects if times[o.colour] == 1]


def _choose(rng: np.random.Generator, objects: Sequence[SceneObject]) -> SceneObject | None:
    return objects[int(rng.integers(len(objects)))] if objects else None


def ask_count(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    if not scene.objects:
        return None
    kind = int(rng.integers(3))
    if kind == 0:
        noun, number = "objects", len(scene.objects)
    elif kind == 1:
        group = _pick(rng, [o.group for o in scene.objects] + [_pick(rng, GROUPS)])
        noun = BY_GROUP[group][0].group + ("s" if group not in ("fruit", "food") else " items")
        number = sum(o.group == group for o in scene.objects)
    else:
        obj = scene.objects[int(rng.integers(len(scene.objects)))]
        cls = next(c for c in CLASSES if c.name == obj.name)
        noun, number = cls.plural, scene.names.count(obj.name)
    return Question("count", _pick(rng, COUNT_WORDINGS).format(xs=noun), str(number))


def ask_relation(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    objects = _unique(scene)
    if len(objects) < 2:
        return None
    i, j = rng.choice(len(objects), 2, replace=False)
    x, y = objects[int(i)], objects[int(j)]
    dx, dy = x.centre[0] - y.centre[0], x.centre[1] - y.centre[1]
    horizontal = bool(rng.integers(2))
    offset = dx if horizontal else dy
    if abs(offset) < MIN_OFFSET:
        return None
    true = RELATIONS[(0 if offset < 0 else 1) if horizontal else (2 if offset < 0 else 3)]
    false = RELATIONS[(1 if offset < 0 else 0) if horizontal else (3 if offset < 0 else 2)]
    is_true = bool(rng.integers(2))
    text = _pick(rng, RELATION_WORDINGS).format(
        x=x.name, y=y.name, relation=true if is_true else false
    )
    return Question("relation", text, "yes" if is_true else "no")


def ask_colour(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    obj = _choose(rng, _unique(scene))
    if obj is None:
        return None
    return Question("colour", _pick(rng, COLOUR_WORDINGS).format(x=obj.name), obj.colour)


def ask_name(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    obj = _choose(rng, _sole_colour(scene))
    if obj is None:
        return None
    return Question("name", _pick(rng, NAME_WORDINGS).format(colour=obj.colour), obj.name)


def ask_category(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    obj = _choose(rng, _sole_colour(scene))
    if obj is None:
        return None
    return Question("category", _pick(rng, CATEGORY_WORDINGS).format(colour=obj.colour), obj.group)


def ask_choice(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    obj = _choose(rng, scene.objects)
    if obj is None:
        return None
    others = [c.name for c in BY_GROUP[obj.group] if c.name not in scene.names]
    options = [str(n) for n in rng.choice(others, 3, replace=False)] + [obj.name]
    rng.shuffle(options)
    listed = " ".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=True))
    text = f"{_pick(rng, CHOICE_WORDINGS)} {listed}"
    return Question("choice", text, LETTERS[options.index(obj.name)])


def ask_ocr(rng: np.random.Generator, scene: Scene, _: Statistics) -> Question | None:
    return Question("ocr", _pick(rng, OCR_WORDINGS), scene.digits) if scene.digits else None


def ask_presence(rng: np.random.Generator, scene: Scene, statistics: Statistics) -> Question | None:
    """A yes/no question, half of them no; negatives of all three POPE kinds."""
    if scene.objects and rng.random() < 0.5:
        return ask_existence(
            rng, scene.names[int(rng.integers(len(scene.names)))], True, "existence"
        )
    kind = _pick(rng, ("random", "popular", "adversarial"))
    name = _pick(rng, negatives(rng, scene, statistics, kind, 4))
    return ask_existence(rng, name, False, "existence")


ASKERS: dict[str, Callable[[np.random.Generator, Scene, Statistics], Question | None]] = {
    "existence": ask_presence,
    "count": ask_count,
    "relation": ask_relation,
    "colour": ask_colour,
    "name": ask_name,
    "category": ask_category,
    "choice": ask_choice,
    "ocr": ask_ocr,
}
TRAINING_MIX = (
    "existence", "existence", "existence", "count", "relation", "colour", "name", "category",
    "choice", "ocr",
)  # fmt: skip


def ask_all(rng: np.random.Generator, scene: Scene, statistics: Statistics) -> list[Question]:
    """A training conversation: the questions the scene allows, shuffled, and one caption.

    The caption mostly comes last: before the questions it would give their answers away.
    """
    questions: list[Question] = []
    texts: set[str] = set()
    for kind in TRAINING_MIX:
        question = ASKERS[kind](rng, scene, statistics)
        if question is not None and question.text not in texts:
            texts.add(question.text)
            questions.append(question)
    order = rng.permutation(len(questions))
    shuffled = [questions[int(i)] for i in order]
    final = ask_caption(rng, scene)
    return [final, *shuffled] if rng.random() < 0.25 else [*shuffled, final]


def preference_existence(
    rng: np.random.Generator, scene: Scene, statistics: Statistics
) -> tuple[Question, str] | None:
    """A question after an object with the wrong answer rejected: two of three ask after one that is
    not there and is often seen with what is."""
    if not scene.objects:
        return None
    present = int(rng.integers(3)) == 0
    names = scene.names if present else negatives(rng, scene, statistics, "adversarial", 3)
    asked = ask_existence(rng, _pick(rng, names), present, "existence")
    return asked, "no" if present else "yes"


def preference_caption(
    rng: np.random.Generator, scene: Scene, statistics: Statistics
) -> tuple[Question, str] | None:
    """A caption question with a rejected answer that names an object which is not there.

    The intruder is adversarial: a class often seen with what the picture shows.
    """
    if not scene.objects:
        return None
    names = list(scene.names)
    intruder = _pick(rng, negatives(rng, scene, statistics, "adversarial", 3))
    names[int(rng.integers(len(names)))] = intruder
    return ask_caption(rng, scene), caption(scene, names)
