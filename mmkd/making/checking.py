"""Apply checks to answers, with the models that a check asks. Every rank calls it."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

from mmkd.errors import RecipeError
from mmkd.making.ask import Asker, shared
from mmkd.making.base import Answer, Request
from mmkd.making.checks import AnswerCheck, Ask
from mmkd.making.choose import Answered
from mmkd.making.questions import Question, Questions
from mmkd.making.requests import request_of
from mmkd.runtime import distributed


class Checking:
    """Lets checks judge answers.

    Args:
        questions: of the answers.
        revisions: of the models, by name.
        seed: of the entry of `make`.
        asker: asks models.
        where: what messages call the entry.
    """

    def __init__(
        self,
        questions: Questions,
        revisions: Mapping[str, str],
        seed: int,
        asker: Asker,
        where: str,
    ):
        self.questions, self.revisions, self.seed = questions, revisions, seed
        self.asker, self.where = asker, where

    def apply(self, check: AnswerCheck, answered: Sequence[Answered]) -> None:
        """Let a check judge all answers, after the models that it asks have replied."""
        replies = self._replies(check, answered) if check.config.models else {}
        for position, one in enumerate(answered):
            one.apply(check, replies.get(position, []))

    def _replies(self, check: AnswerCheck, answered: Sequence[Answered]) -> dict[int, list[Answer]]:
        """The replies to all that a check asks, by position in `answered`. A check is called until
        it asks nothing further about any question."""
        replies: dict[int, list[Answer]] = {i: [] for i, one in enumerate(answered) if one.passed}
        own = [i for i in replies if i % distributed.world_size() == distributed.rank()]
        for turn in count(1):
            asked = {i: self._to_ask(check, answered[i], replies[i]) for i in own}
            keys = shared({i: [r.key for _, r in row] for i, row in asked.items() if row})
            if not keys:
                break
            title = f": {check.config.kind}" + (f" {turn}" if turn > 1 else "")
            self.asker.ask([pair for row in asked.values() for pair in row], check.sampling, title)
            nothing = Answer("", False)
            for i, row in keys.items():
                replies[i] += [self.asker.log.answers.get(key, nothing) for key in row]
        return replies

    def _to_ask(
        self, check: AnswerCheck, one: Answered, replies: Sequence[Answer]
    ) -> list[tuple[str, Request]]:
        """What a check asks next about the answers that have passed so far: requests, each with the
        name of the model.

        Args:
            check: that asks.
            one: question and answers.
            replies: to what it has asked before.

        Raises:
            RecipeError: it asks a model that its settings do not name.
        """
        answers, known = [answer.candidate for answer in one.passed], [*replies]

        def asks() -> list[Ask]:
            return check.asks(self.questions.at(one.index), answers, known)

        def again(number: int) -> Question:
            return asks()[number].question

        found = []
        for number, ask in enumerate(asks()):
            if number < len(known):
                continue
            if ask.model not in check.config.models:
                raise RecipeError(
                    f"the check {check.config.kind!r} asks {ask.model!r}, which is not among the "
                    "'models' of its settings",
                    where=f"{self.where}.checks",
                    hint="add it there",
                )
            name, read = ask.model, partial(again, number)
            request = request_of(
                ask.question, self.revisions[name], check.sampling, self.seed, 0, read
            )
            found.append((name, request))
        return found
