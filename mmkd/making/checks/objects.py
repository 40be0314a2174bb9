"""Score answers by the objects that they name (CHAIR, Rohrbach et al. 2018, arXiv 1809.02156)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Candidate, Verdict
from mmkd.making.checks.words import words_of
from mmkd.making.questions import Question, Questions
from mmkd.recipe.answer_checks import ObjectsConfig


class Objects(AnswerCheck):
    """Scores answers by the names of objects in them: first by those that are not in the image
    (CHAIR), then by those that are left out. Fewer are better."""

    config_class: ClassVar = ObjectsConfig

    def __init__(self, config: Any, questions: Questions, candidates: int):
        super().__init__(config, questions, candidates)
        self.vocabulary = Vocabulary([*config.names, *questions.names])

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        present = {singular(name) for name in question.objects}
        most = self.config.most_invented
        found = []
        for answer in answers:
            named = self.vocabulary.named_in(answer.text)
            invented, missing = len(named - present), len(present - named)
            passed = most is None or invented <= most
            found.append(Verdict(passed, (float(-invented), float(-missing))))
        return found


class Vocabulary:
    """Names of objects that texts are searched for, of one word or several.

    Args:
        names: singular or plural.
    """

    def __init__(self, names: Iterable[str]):
        self._names = {tuple(singular(name).split()) for name in names if words_of(name)}
        self._longest = max(map(len, self._names), default=0)

    def named_in(self, text: str) -> set[str]:
        """The names in a text, in the singular. Longer names come first: a hot dog is no dog."""
        words = singular(text).split()
        found, position = set[str](), 0
        while position < len(words):
            for size in range(self._longest, 0, -1):
                if tuple(words[position : position + size]) in self._names:
                    found.add(" ".join(words[position : position + size]))
                    position += size
                    break
            else:
                position += 1
        return found


_IRREGULAR = {
    **{"children": "child", "feet": "foot", "geese": "goose", "men": "man", "mice": "mouse"},
    **{"people": "person", "teeth": "tooth", "women": "woman"},
    **{"heroes": "hero", "potatoes": "potato", "tomatoes": "tomato"},
    **{"calves": "calf", "halves": "half", "knives": "knife", "leaves": "leaf", "loaves": "loaf"},
    **{"scarves": "scarf", "shelves": "shelf", "wolves": "wolf"},
}
_ENDINGS = (
    (re.compile(r"(?<=[a-z]{2})ies?$"), "y"),  # cherries and cherry, cookies and cookie
    (re.compile(r"(?:(?<=ch)|(?<=sh)|(?<=ss)|(?<=us)|(?<=x))es$"), ""),
    (re.compile(r"(?<=[a-rt-z])s$"), ""),
)


def singular(text: str) -> str:
    """A text's words in lower case, each in the singular by the usual rules of English. Both sides
    of a comparison go through it, so that a wrong singular does no harm if it is the same."""
    return " ".join(map(_singular, words_of(text)))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    for ending, replacement in _ENDINGS:
        if ending.search(word):
            return ending.sub(replacement, word)
    return word
