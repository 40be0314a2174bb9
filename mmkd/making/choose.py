"""Choose the answers that become records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmkd.errors import RecipeError
from mmkd.making.base import Answer
from mmkd.making.checks import AnswerCheck, Candidate
from mmkd.making.questions import Question


@dataclass
class Judged:
    """A candidate with what the checks have said.

    Attributes:
        number: of the candidate.
        candidate: the answer.
        key: of its request.
        refused: kind of the check that has refused it; None if it may be used.
        scores: by kind of check.
    """

    number: int
    candidate: Candidate
    key: str
    refused: str | None = None
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass
class Answered:
    """A question with its answers.

    Attributes:
        index: of the question.
        question: as it was asked, without the context of the maker.
        answers: all candidates, in the order of their numbers.
    """

    index: int
    question: Question
    answers: list[Judged]

    @property
    def passed(self) -> list[Judged]:
        """The answers that no check has refused."""
        return [answer for answer in self.answers if answer.refused is None]

    def apply(self, check: AnswerCheck, replies: Sequence[Answer]) -> None:
        """Let a check judge the answers that passed until now.

        Args:
            check: to apply.
            replies: to `check.asks`.

        Raises:
            RecipeError: a check that scores answers has passed one without a score.
        """
        remaining = self.passed
        if not remaining:
            return
        kind = check.config.kind
        candidates = [answer.candidate for answer in remaining]
        verdicts = check.verdicts(self.question, candidates, replies)
        for answer, verdict in zip(remaining, verdicts, strict=True):
            if verdict.score is not None:
                answer.scores[kind] = verdict.score
            elif verdict.passed and check.config.scores:
                raise RecipeError(
                    f"the check {kind!r} scores answers, and has passed one without a score",
                    where="make.checks",
                    hint="give each of its verdicts a score, or set 'scores' of its settings to "
                    "False",
                )
            if not verdict.passed:
                answer.refused = kind

    def best(self, scorer: str | None) -> Judged | None:
        """The answer with the highest score of those that passed, the first one of equals.

        Args:
            scorer: kind of the check that decides; None: the first answer.
        """
        passed = self.passed
        if not passed or scorer is None:
            return passed[0] if passed else None
        return max(passed, key=lambda answer: answer.scores[scorer])

    def pair(self, scorer: str) -> tuple[Judged, Judged] | None:
        """The best answer, and the one with the lowest score of those with another text, which may
        be one that a check with scores has refused; None if there are no two, or the best one is
        not better. Answers that were cut off are left out: a pair has no mark for them."""
        whole = [a for a in self.answers if a.candidate.finished and scorer in a.scores]
        passed = [answer for answer in whole if answer.refused is None]
        if not passed:
            return None
        best = max(passed, key=lambda answer: answer.scores[scorer])
        others = [answer for answer in whole if answer.candidate.text != best.candidate.text]
        worst = min(others, key=lambda answer: answer.scores[scorer], default=best)
        return (best, worst) if worst.scores[scorer] < best.scores[scorer] else None


def refusals(answered: Sequence[Answered]) -> Counter[str]:
    """Number of answers that each kind of check has refused."""
    return Counter(a.refused for one in answered for a in one.answers if a.refused is not None)


def hard_share(answered: Sequence[Answered], kind: str) -> tuple[int, int]:
    """How many questions are hard, and how many a check of this kind has looked at. A question is
    hard if the check passes one of its answers."""
    looked = [[a for a in one.answers if kind in a.scores] for one in answered]
    hard = [any(a.refused != kind for a in answers) for answers in looked if answers]
    return sum(hard), len(hard)
