"""Another model rates the answers.

Lion (Jiang et al. 2023, arXiv 2305.12870) has a judge rate two answers from 1 to 10 in both orders,
because judges prefer one place, and takes the mean. Here each answer is rated next to the one after
it and the one before it, in both orders, so that n answers take 2 n ratings.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Candidate, Verdict
from mmkd.making.questions import Question
from mmkd.recipe.answer_checks import JudgeConfig

ONE = """\
Question: {question}

Answer: {one}

Rate the answer from 1 (bad) to 10 (perfect) by {criteria}. \
Reply with the rating only, in the form "Rating: 7"."""
TWO = """\
Question: {question}

Answer A: {one}

Answer B: {other}

Rate both answers from 1 (bad) to 10 (perfect) by {criteria}. The order of the answers means \
nothing. Reply with the two ratings only, in the form "A: 7, B: 4"."""
_OF_TEN = re.compile(r"\s*/\s*10\b")
_OF_OTHERS = re.compile(r"\d\s*/\s*\d")
_RATING = re.compile(r"(?<![\w.])(10(?:\.0+)?|[1-9](?:\.\d+)?)(?!\w|\.\d)")


class Judge(AnswerCheck):
    """Refuses answers whose mean rating is below `least`, or that have no rating that can be
    read."""

    config_class: ClassVar = JudgeConfig

    def asks(self, question: Question, answers: Sequence[Candidate]) -> list[Question]:
        if len(answers) == 1:
            return [self._ask(question, ONE, one=answers[0].text)]
        return [
            self._ask(question, TWO, one=answers[i].text, other=answers[j].text)
            for i, j in self._pairs(len(answers))
        ]

    def _ask(self, question: Question, form: str, **texts: str) -> Question:
        text = form.format(question=question.text, criteria=self.config.criteria, **texts)
        images = [{"type": "image"} for _ in question.references]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        return replace(question, messages=messages)

    @staticmethod
    def _pairs(count: int) -> list[tuple[int, int]]:
        """Pairs of answers that are rated together, in both orders."""
        if count == 2:
            return [(0, 1), (1, 0)]
        ring = [(i, (i + 1) % count) for i in range(count)]
        return [pair for i, j in ring for pair in ((i, j), (j, i))]

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        if len(answers) == 1:
            found = [ratings(reply.text, 1) for reply in replies]
            return [self._verdict([row[0] for row in found if row])]
        given: list[list[float]] = [[] for _ in answers]
        for (i, j), reply in zip(self._pairs(len(answers)), replies, strict=True):
            if pair := ratings(reply.text, 2):
                given[i].append(pair[0])
                given[j].append(pair[1])
        return [self._verdict(row) for row in given]

    def _verdict(self, given: list[float]) -> Verdict:
        if not given:
            return Verdict(False)
        mean = sum(given) / len(given)
        return Verdict(mean >= self.config.least, (mean,))


def ratings(text: str, count: int) -> list[float]:
    """The ratings in a judge's reply, such as 7, 7.5 or 7/10; [] if there are not exactly `count`
    numbers from 1 to 10, or one is out of another number than 10."""
    text = _OF_TEN.sub("", text)
    found = [float(number) for number in _RATING.findall(text)]
    return found if len(found) == count and not _OF_OTHERS.search(text) else []
