"""Compare answers with the record's own answer."""

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from mmkd.errors import RecipeError
from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Candidate, Verdict
from mmkd.making.checks.words import words_of
from mmkd.making.questions import Question, Questions
from mmkd.recipe.answer_checks import ReferenceConfig

_CHOICE = re.compile(r"\(?([A-Za-z])(?:[.):]|\s|$)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


class Reference(AnswerCheck):
    """Refuses answers that differ from the record's own answer; with `differ`, those that are equal
    to it. Records without an answer refuse all."""

    config_class: ClassVar = ReferenceConfig

    def __init__(self, config: Any, questions: Questions, candidates: int):
        super().__init__(config, questions, candidates)
        self._same = _MATCHES[config.match]
        if config.match == "math":
            _import_math_verify()

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        truth = question.reference
        if truth is None:
            return [Verdict(False) for _ in answers]
        if self.config.differ:
            passed = [not self._same(a.text, truth) and not same_text(a.text, truth)
                      for a in answers]  # fmt: skip
        else:
            passed = [self._same(answer.text, truth) for answer in answers]
        return [Verdict(good, (float(good),)) for good in passed]


def same_text(answer: str, truth: str) -> bool:
    """Whether two texts have the same words, without regard to case and punctuation."""
    return words_of(answer) == words_of(truth)


def same_choice(answer: str, truth: str) -> bool:
    """Whether two answers begin with the letter of the same option, such as "B" or "(b) A dog."."""
    letters = [_CHOICE.match(text.strip()) for text in (answer, truth)]
    first, second = (None if found is None else found[1].lower() for found in letters)
    return first is not None and first == second


def same_number(answer: str, truth: str) -> bool:
    """Whether the last numbers of two texts are equal; commas between digits are left out."""
    first, second = (_NUMBER.findall(text) for text in (answer, truth))
    if not first or not second:
        return False
    return _value(first[-1]) == _value(second[-1])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def same_expression(answer: str, truth: str) -> bool:
    """Whether two texts hold equal mathematical expressions, by math-verify. It reads LaTeX by a
    grammar, and other expressions only if they have no letters, so that no text becomes code."""
    parse, verify = _import_math_verify()
    return bool(verify(parse(truth), parse(answer)))


def _import_math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise RecipeError(
            "match: math needs the package math-verify",
            where="make.checks",
            hint="pip install 'mmkd[data]', or choose match: number",
        ) from error
    return parse, verify


_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "text": same_text,
    "choice": same_choice,
    "number": same_number,
    "math": same_expression,
}
