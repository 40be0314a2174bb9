"""The interface of checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mmkd.making.base import Answer
from mmkd.making.questions import Question, Questions
from mmkd.recipe import Check, SamplingConfig


@dataclass(frozen=True)
class Candidate:
    """One of the answers to a question.

    Attributes:
        text: of the answer.
        finished: the model ended it.
        maker: name of the model.
    """

    text: str
    finished: bool
    maker: str


@dataclass(frozen=True)
class Verdict:
    """What a check says of an answer.

    Attributes:
        passed: the answer may be used.
        score: compared element by element, larger is better; None from checks without scores.
    """

    passed: bool
    score: tuple[float, ...] | None = None


class AnswerCheck(Check):
    """Base class of checks.

    Checks run in the order of the recipe. A check sees the answers that passed those before it.

    Args:
        config: settings of the check.
        questions: of the entry of `make`.
        candidates: number of answers to each question, those that did not pass included.
    """

    sampling: ClassVar[SamplingConfig] = SamplingConfig(max_new_tokens=256, temperature=0)
    """How the answers to `asks` are sampled."""

    def __init__(self, config: Any, questions: Questions, candidates: int):
        self.config, self.questions, self.candidates = config, questions, candidates

    def asks(self, question: Question, answers: Sequence[Candidate]) -> list[Question]:
        """What the check asks the model that its settings name (`CheckConfig.model`), before
        `verdicts`; nothing by default."""
        return []

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        """A verdict for each answer.

        Args:
            question: of the answers.
            answers: one or more.
            replies: to `asks`, in the same order.
        """
        raise NotImplementedError
