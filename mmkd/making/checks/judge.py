"""Other models rate the answers.

Lion (Jiang et al. 2023, arXiv 2305.12870) has a judge rate two answers from 1 to 10 in both orders,
because judges prefer one place, and takes the mean. Here each answer is rated next to the one after
it and the one before it, in both orders, so that n answers take 2 n ratings. Lion calls a question
hard if the teacher's answer is rated higher than the student's by 1 or more: `margin`.

GRA (Gao et al. 2025, arXiv 2504.12322) has several small models review an answer, and another one
decide where they disagree.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mmkd.making.base import Answer
from mmkd.making.checks.base import AnswerCheck, Ask, Candidate, Verdict
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


OWN = -1
"""In place of an answer's index: the record's own answer."""


@dataclass(frozen=True)
class Rating:
    """What a model rates in one reply.

    Attributes:
        model: its name.
        places: indices of the answers, in the order in which the model sees them.
    """

    model: str
    places: tuple[int, ...]


class Judge(AnswerCheck):
    """Refuses answers whose score is too small, or that have no rating that can be read. The score
    is the mean over the reviewers, or the adjudicator's if they differ too much."""

    config_class: ClassVar = JudgeConfig

    def asks(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Ask]:
        return [
            Ask(rating.model, self._ask(question, answers, rating.places))
            for rating in self._plan(question, answers, replies)
        ]

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        plan, last = self._plan(question, answers, replies), self.config.adjudicator
        found = []
        for given in _scores(plan, replies, len(answers)):
            counted = [given[last]] if last in given else [*given.values()]
            scores = [score for score in counted if score is not None]
            mean = sum(scores) / len(scores) if scores else None
            passed = mean is not None and mean >= self.config.needed
            found.append(Verdict(passed, None if mean is None else (mean,)))
        return found

    def _plan(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Rating]:
        """The ratings of the reviewers and, once they are known, those of the adjudicator."""
        if self.config.compares and question.reference is None:
            return []
        plan: list[Rating] = []
        for name in self.config.by:
            others = [place for place, answer in enumerate(answers) if answer.maker != name]
            plan += self._ratings(name, others)
        if self.config.adjudicator is None or len(replies) < len(plan):
            return plan
        reviewed = _scores(plan, replies, len(answers))
        apart = [i for i, given in enumerate(reviewed) if _spread(given) > self.config.spread]
        return plan + self._ratings(self.config.adjudicator, apart)

    def _ratings(self, model: str, places: Sequence[int]) -> list[Rating]:
        """How a model rates answers: one alone, several in pairs, and all next to the record's own
        answer if they are compared with it. Each pair is rated in both orders."""
        count = len(places)
        if self.config.compares:
            pairs = [(place, OWN) for place in places]
        elif count == 1:
            return [Rating(model, (places[0],))]
        elif count == 2:
            pairs = [(places[0], places[1])]
        else:
            pairs = [(places[i], places[(i + 1) % count]) for i in range(count)]
        return [Rating(model, pair) for i, j in pairs for pair in ((i, j), (j, i))]

    def _ask(
        self, question: Question, answers: Sequence[Candidate], places: Sequence[int]
    ) -> Question:
        form = ONE if len(places) == 1 else TWO
        shown = [question.reference if i == OWN else answers[i].text for i in places]
        texts = dict(zip(("one", "other"), shown, strict=False))
        text = form.format(question=question.text, criteria=self.config.criteria, **texts)
        images = [{"type": "image"} for _ in question.references]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        return replace(question, messages=messages)


def _scores(
    plan: Sequence[Rating], replies: Sequence[Answer], count: int
) -> list[dict[str, float | None]]:
    """For each of `count` answers, the mean score that each model has given it; None if none of its
    replies can be read. Ratings without a reply are left out."""
    given: list[dict[str, list[float]]] = [{} for _ in range(count)]
    for rating, reply in zip(plan, replies, strict=False):
        found = ratings(reply.text, len(rating.places))
        seen = dict(zip(rating.places, found, strict=False))
        own = seen.get(OWN, 0.0)
        for place in rating.places:
            if place != OWN:
                scores = given[place].setdefault(rating.model, [])
                scores += [seen[place] - own] if place in seen else []
    return [
        {name: sum(row) / len(row) if row else None for name, row in models.items()}
        for models in given
    ]


def _spread(given: Mapping[str, float | None]) -> float:
    """Difference between the largest and the smallest score."""
    scores = [score for score in given.values() if score is not None]
    return max(scores) - min(scores) if scores else 0.0


def ratings(text: str, count: int) -> list[float]:
    """The ratings in a judge's reply, such as 7, 7.5 or 7/10; [] if there are not exactly `count`
    numbers from 1 to 10, or one is out of another number than 10."""
    text = _OF_TEN.sub("", text)
    found = [float(number) for number in _RATING.findall(text)]
    return found if len(found) == count and not _OF_OTHERS.search(text) else []
