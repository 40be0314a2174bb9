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


@dataclass(frozen=True)
class Ask:
    """What a check asks a model.

    Attributes:
        model: name of the model, one of `CheckConfig.models`.
        question: with references to its images.
    """

    model: str
    question: Question


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

    def asks(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Ask]:
        """What the check asks before `verdicts`; nothing by default.

        It is called with no replies first, and then with the replies to all that it has asked,
        until it asks nothing further. So what it asks may depend on earlier replies.

        Args:
            question: of the answers.
            answers: one or more.
            replies: to what the check has asked so far, in the same order.

        Returns:
            Everything asked so far, in the same order, and what comes next.
        """
        return []

    def verdicts(
        self, question: Question, answers: Sequence[Candidate], replies: Sequence[Answer]
    ) -> list[Verdict]:
        """A verdict for each answer.

        Args:
            question: of the answers.
            answers: one or more.
            replies: to all that `asks` has named, in the same order.
        """
        raise NotImplementedError
