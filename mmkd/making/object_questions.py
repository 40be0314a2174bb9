"""Questions about the objects that a model has listed for an image.

UniversalNER (Zhou et al. 2023, arXiv 2308.03279) asks for types that a passage does not contain,
and draws them by their frequency. On images this gives POPE's kinds of negatives (Li
et al. 2023, arXiv 2305.10355): uniform is its random, frequency its popular and cooccurring its
adversarial one. UniversalNER trusts its lists; a list of objects is never complete, so the model
is asked again.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from mmkd.making.listed import Listed
from mmkd.making.questions import Question, about_images
from mmkd.recipe import ExistenceConfig, ObjectQuestionsConfig

YES, NO = "yes", "no"
_VOWELS = "aeiou"


def object_questions(
    config: ObjectQuestionsConfig, image: Question, listed: Listed, seed: int
) -> list[Question]:
    """The questions about one image, without references to it. They depend on the lists of all
    images, the seed and the image's name, and not on the order of the images.

    Args:
        config: settings.
        image: the question for the list, whose images are asked about.
        listed: the objects of all images.
        seed: of the names that are drawn.
    """
    words = f"{seed} {image.id}".encode()
    chance = random.Random(hashlib.blake2b(words, digest_size=8).digest())
    found = []
    if config.existence is not None:
        found += _existence(config.existence, image, listed, chance)
    present = listed.present(image.group)
    for name in chance.sample(present, min(config.per_image, len(present))):
        others = [other for other in present if other != name]
        for number, text in enumerate(config.ask):
            if "{other}" in text and not others:
                continue
            other = listed.shown[chance.choice(others)] if others else ""
            asked = _filled(text, listed.shown[name], other)
            found.append(_about(image, asked, f"{name}-{number}"))
    return found


def _existence(
    config: ExistenceConfig, image: Question, listed: Listed, chance: random.Random
) -> list[Question]:
    """Questions about present and about as many absent objects."""
    present, absent = listed.present(image.group), listed.absent(image.group)
    count = min(config.per_image // 2, len(present), len(absent))
    weights = listed.weights(image.group, absent, config.negatives)
    there = chance.sample(present, count)
    missing = _draw(absent, weights, count, chance)
    return [
        _about(image, _filled(config.question, listed.shown[name], ""), f"{answer}-{name}", answer)
        for answer, names in ((YES, there), (NO, missing))
        for name in names
    ]


def _draw(
    names: Sequence[str], weights: Sequence[float], count: int, chance: random.Random
) -> list[str]:
    """Draw different names one after the other, each in proportion to its weight; names of weight
    0 come last, all alike."""
    left = dict(zip(names, weights, strict=True))
    found: list[str] = []
    while len(found) < count:
        given = [*left.values()] if any(left.values()) else [1.0] * len(left)
        (name,) = chance.choices([*left], given)
        found.append(name)
        del left[name]
    return found


def _about(image: Question, text: str, label: str, expected: str | None = None) -> Question:
    count = sum(part["type"] == "image" for m in image.messages for part in m["content"])
    return replace(
        image,
        id=f"{image.id}-{label.replace(' ', '_')}",
        messages=about_images(count, text),
        references=[],
        expected=expected,
    )


def _filled(text: str, name: str, other: str) -> str:
    article = "an" if name[0] in _VOWELS else "a"
    return text.format(name=name, a_name=f"{article} {name}", names=plural(name), other=other)


def plural(name: str) -> str:
    """The plural by the usual rules of English."""
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in _VOWELS:
        return f"{name[:-1]}ies"
    return {"person": "people", "man": "men", "woman": "women", "child": "children"}.get(
        name, f"{name}s"
    )


def balanced(found: Sequence[tuple[Question, int]]) -> set[int]:
    """Positions of questions to leave out, so that each image has records of as many present as
    absent objects.

    Args:
        found: questions with the number of their records.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for position, (question, records) in enumerate(found):
        if question.expected is not None and records:
            group = groups.setdefault(question.group, {YES: [], NO: []})
            group[question.expected].append(position)
    dropped: set[int] = set()
    for group in groups.values():
        least = min(map(len, group.values()))
        dropped.update(place for places in group.values() for place in places[least:])
    return dropped
