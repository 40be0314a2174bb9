"""Checks of an answer's form: empty, cut off, repetitive."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Candidate, Verdict
from mmkd.making.questions import Question
from mmkd.recipe.answer_checks import CutConfig, EmptyConfig, RepeatsConfig

_CHARACTER = re.compile(r"\w")


class Empty(AnswerCheck):
    """Refuses answers without any letter or digit."""

    config_class: ClassVar = EmptyConfig

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        return [Verdict(bool(_CHARACTER.search(answer.text))) for answer in answers]


class Cut(AnswerCheck):
    """Refuses answers that were cut off at `max_new_tokens`."""

    config_class: ClassVar = CutConfig

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        return [Verdict(answer.finished) for answer in answers]


class Repeats(AnswerCheck):
    """Refuses answers in which a sequence of `ngram` words occurs more than `most` times."""

    config_class: ClassVar = RepeatsConfig

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        size, most = self.config.ngram, self.config.most
        return [Verdict(most_repeated(answer.text, size) <= most) for answer in answers]


def most_repeated(text: str, size: int) -> int:
    """How often the most frequent sequence of `size` words occurs in a text, without regard to
    case; 0 for a shorter text."""
    words = text.lower().split()
    found = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    return max(found.values(), default=0)
