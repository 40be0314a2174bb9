"""Compare answers to questions about existence with the list of the image's objects."""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Candidate, Verdict
from mmkd.making.questions import Question
from mmkd.recipe import CheckConfig

_FIRST = re.compile(r"\W*(\w+)")


class ExistenceCheckConfig(CheckConfig):
    """Settings of the check, which recipes do not name: `objects.existence` brings it."""

    kind: Literal["existence"] = "existence"


class Existence(AnswerCheck):
    """Refuses answers whose first word is not the yes or no that the list gives. Answers to other
    questions pass."""

    config_class: ClassVar = ExistenceCheckConfig

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        if question.expected is None:
            return [Verdict(True) for _ in answers]
        return [Verdict(_first_word(answer.text) == question.expected) for answer in answers]


def _first_word(text: str) -> str:
    found = _FIRST.match(text)
    return "" if found is None else found[1].lower()
