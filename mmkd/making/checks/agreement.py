"""Agreement of an answer with the other answers to the same question.

Impossible Distillation (Jung et al. 2023, arXiv 2305.16635) and self-consistency (Wang et al. 2022,
arXiv 2203.11171) let the answers of one model check each other. This is in the spirit of both: the
F1 score of words needs no other model, and equals an exact match for answers of one word.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Candidate, Verdict
from mmkd.making.checks.words import word_f1
from mmkd.making.questions import Question
from mmkd.recipe.answer_checks import AgreesConfig


class Agreement(AnswerCheck):
    """Refuses answers whose mean word F1 with the other answers is below `least`. An answer that an
    earlier check has refused counts as one that shares no word."""

    config_class: ClassVar = AgreesConfig

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        found = []
        for number, answer in enumerate(answers):
            others = [a.text for i, a in enumerate(answers) if i != number]
            agreement = sum(word_f1(answer.text, other) for other in others)
            agreement /= self.candidates - 1
            found.append(Verdict(agreement >= self.config.least, (agreement,)))
        return found
