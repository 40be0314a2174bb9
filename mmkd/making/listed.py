"""The objects that a model has listed for each image of a data set."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mmkd.making.checks.objects import Vocabulary, singular

MOST_WORDS = 4
"""Most words of a listed name; longer items are sentences."""
_BETWEEN = re.compile(r"[,;\n]|\band\b|•|^\s*[-*]", re.MULTILINE)
_BEFORE = re.compile(r"^(?:\d+[.)]?|an?|the|some|several|many|two|three|four|five)\s+", re.I)


def parse_list(text: str) -> dict[str, str]:
    """The names in a list such as "a dog, two cats and the hot dog", as `singular` writes them,
    each with its form in the list."""
    names: dict[str, str] = {}
    for item in _BETWEEN.split(text):
        item = item.strip(" .:!?\"'`*-")
        while (shorter := _BEFORE.sub("", item)) != item:
            item = shorter
        name = singular(item)
        if name and len(name.split()) <= MOST_WORDS and not name.isdigit():
            names.setdefault(name, " ".join(item.lower().split()))
    return names


@dataclass(frozen=True)
class Listed:
    """What is listed for each image.

    Attributes:
        objects: by image, its names, as `singular` writes them.
        shown: by name, its form in questions, in the singular.
        least_images: a name is known if it is listed for so many images.
    """

    objects: Mapping[str, Sequence[str]]
    shown: Mapping[str, str]
    least_images: int

    @classmethod
    def of(cls, answers: Mapping[str, str], names: Sequence[str], least_images: int) -> "Listed":
        """Read answers.

        Args:
            answers: by image, what the model has said.
            names: that are searched for; [] reads each answer as a list.
            least_images: as the attribute.
        """
        if names:
            known = Vocabulary(names)
            found = {key: sorted(known.named_in(text)) for key, text in answers.items()}
            return cls(found, {singular(name): name for name in names}, least_images)
        lists = {key: parse_list(text) for key, text in answers.items()}
        forms: dict[str, Counter[str]] = {}
        for one in lists.values():
            for name, form in one.items():
                forms.setdefault(name, Counter())[form] += 1
        shown = {name: _singular_form(name, count) for name, count in forms.items()}
        return cls({key: list(one) for key, one in lists.items()}, shown, least_images)

    @cached_property
    def counts(self) -> Counter[str]:
        """For each known name, the number of images that have it."""
        found = Counter(name for names in self.objects.values() for name in set(names))
        known = {name: count for name, count in found.items() if count >= self.least_images}
        return Counter(dict(sorted(known.items())))

    @cached_property
    def together(self) -> dict[str, Counter[str]]:
        """For each known name, how many images have it together with each other known name."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self.counts}
        for names in self.objects.values():
            known = [name for name in dict.fromkeys(names) if name in self.counts]
            for one in known:
                found[one].update(name for name in known if name != one)
        return found

    def present(self, image: str) -> list[str]:
        """The known names of an image."""
        return [name for name in self.objects[image] if name in self.counts]

    def absent(self, image: str) -> list[str]:
        """The known names that an image does not have. A name that shares a word with a listed one
        may be the same object, or a part of it, and is left out: with "hot dog" in an image,
        "dog" is not absent."""
        words = {word for name in self.objects[image] for word in name.split()}
        return [name for name in self.counts if not words & set(name.split())]

    def weights(self, image: str, names: Sequence[str], kind: str) -> list[float]:
        """In proportion to which absent names are drawn.

        Args:
            image: the image.
            names: that are absent.
            kind: frequency, uniform or cooccurring, as in `ExistenceConfig`. If no name is listed
                together with the image's objects, frequency is taken.
        """
        if kind == "uniform":
            return [1.0] * len(names)
        if kind == "cooccurring":
            present = self.present(image)
            weights = [float(sum(self.together[p][name] for p in present)) for name in names]
            if any(weights):
                return weights
        return [float(self.counts[name]) for name in names]


def _singular_form(name: str, forms: Counter[str]) -> str:
    """The most frequent form of a name that may be a singular; `singular` may write a form that is
    not English, such as "cooky"."""
    single = {form: count for form, count in forms.items() if not form.endswith("s")}
    return max(single, key=lambda form: (single[form], form)) if single else name
