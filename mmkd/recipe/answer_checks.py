"""Settings of the checks of answers that a model has made.

A check may only refuse answers, or also score them. If several score them, the first one in the
recipe's list that does so decides which answer is the best.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from mmkd.recipe.base import Strict
from mmkd.runtime.fields import NAME, NAMED, Prose
from mmkd.runtime.registry import Registry

LEAST_RATING = 7.0
"""A judge's `least` by default."""
ModelName = Annotated[str, Field(max_length=NAME, pattern=NAMED)]


class CheckConfig(Strict):
    """Base of the settings of a check."""

    scores: ClassVar[bool] = False
    """Whether the check scores answers, so that a best and a worst one exist."""

    kind: str

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that the check asks; () if it asks none."""
        return ()

    @property
    def compares(self) -> bool:
        """Whether the check compares answers with the record's own answer."""
        return False

    @property
    def finds_hard(self) -> bool:
        """Whether the check passes only answers to hard questions: those to which the record's own
        answer differs, or is worse."""
        return False

    def check_makers(self, makers: Sequence[str]) -> None:
        """Check that no model is asked about its own answers.

        Args:
            makers: names of the models that answer.

        Raises:
            ValueError: one is.
        """
        for name in self.models:
            if name in makers:
                raise ValueError(f"{name!r} would judge its own answers -- name another model")


class EmptyConfig(CheckConfig):
    """Refuse answers without any letter or digit."""

    kind: Literal["empty"]


class CutConfig(CheckConfig):
    """Refuse answers that were cut off at `max_new_tokens`."""

    kind: Literal["cut"]


class RepeatsConfig(CheckConfig):
    """Refuse answers that repeat themselves."""

    kind: Literal["repeats"]
    ngram: int = Field(4, ge=1, le=100, description="words of a sequence that is counted")
    most: int = Field(3, ge=1, le=10**6, description="how often a sequence may occur")


class AgreesConfig(CheckConfig):
    """Refuse answers that differ from the other answers to the same question. The agreement of two
    answers is the F1 score of their words; an answer's agreement is the mean over the others."""

    scores: ClassVar[bool] = True

    kind: Literal["agrees"]
    least: float = Field(0.5, ge=0, le=1, description="smallest agreement")


class ReferenceConfig(CheckConfig):
    """Refuse answers that differ from the record's own answer; with `differ`, those that are equal
    to it."""

    scores: ClassVar[bool] = True

    kind: Literal["reference"]
    match: Literal["text", "choice", "number", "math"] = Field(
        "text",
        description="text: equal words; choice: the same first letter of an option, such as B; "
        "number: the same last number; math: equal as expressions, by math-verify",
    )
    differ: bool = Field(
        False,
        description="refuse equal answers instead, so that the questions remain whose own answer "
        "is another one",
    )

    @property
    def compares(self) -> bool:
        return True

    @property
    def finds_hard(self) -> bool:
        return self.differ


class ObjectsConfig(CheckConfig):
    """Score answers by the objects that they name and that the record's `objects` contain, after
    CHAIR: objects that are not in the image count first, then objects that are left out."""

    scores: ClassVar[bool] = True

    kind: Literal["objects"]
    names: list[str] = Field(
        [],
        max_length=10**5,
        description="names that answers are searched for; by default the names of all records' "
        "objects",
    )
    most_invented: int | None = Field(
        None, ge=0, le=10**6, description="refuse answers that name more objects that are not there"
    )


class JudgeConfig(CheckConfig):
    """Refuse answers that other models rate low. A single answer is rated from 1 to 10. Several
    answers are rated in pairs, each pair in both orders. With `margin`, each answer is rated next
    to the record's own one, in both orders, and its score is the difference. No model rates answers
    that it has made."""

    scores: ClassVar[bool] = True

    kind: Literal["judge"]
    by: list[ModelName] = Field(
        min_length=1,
        max_length=100,
        description="the reviewers: names of teachers, or names under 'servers'; an answer's "
        "rating is the mean over those that have not made it",
    )
    least: float | None = Field(
        None, ge=1, le=10, description="smallest mean rating; 7 by default, without 'margin'"
    )
    margin: float | None = Field(
        None,
        ge=-9,
        le=9,
        description="smallest difference to the rating of the record's own answer; in place of "
        "'least'",
    )
    spread: float | None = Field(
        None,
        ge=0,
        le=18,
        description="if the reviewers' ratings of an answer differ by more, the adjudicator alone "
        "rates it",
    )
    adjudicator: ModelName | None = Field(
        None, description="a further model, which makes and reviews no answers"
    )
    criteria: Prose = Field(
        "how correct, complete and helpful it is, given the image",
        description="what the judge is told to rate",
    )

    @field_validator("by", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _apart(self) -> "JudgeConfig":
        if self.least is not None and self.margin is not None:
            raise ValueError("an answer needs a rating or a difference -- give either 'least' or "
                             "'margin'")  # fmt: skip
        if len(set(self.by)) != len(self.by):
            raise ValueError("'by' names a reviewer twice -- name it once")
        if (self.spread is None) != (self.adjudicator is None):
            raise ValueError("'spread' and 'adjudicator' go together -- give both or neither")
        if self.spread is not None and len(self.by) < 2:
            raise ValueError("one reviewer has no spread -- name two in 'by', or leave it out")
        if self.adjudicator in self.by:
            raise ValueError(f"the adjudicator {self.adjudicator!r} is a reviewer -- name another "
                             "model")  # fmt: skip
        return self

    @property
    def needed(self) -> float:
        """The smallest score of an answer that passes."""
        if self.margin is not None:
            return self.margin
        return LEAST_RATING if self.least is None else self.least

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.by, *([] if self.adjudicator is None else [self.adjudicator]))

    @property
    def compares(self) -> bool:
        return self.margin is not None

    @property
    def finds_hard(self) -> bool:
        return self.compares

    def check_makers(self, makers: Sequence[str]) -> None:
        """Check that each answer has a reviewer, and each reviewer has answers of other models.

        Args:
            makers: names of the models that answer.

        Raises:
            ValueError: a model would judge its own answers.
        """
        for name in makers:
            alone = self.by == [name] or ([*makers] == [name] and name in self.by)
            if alone or name == self.adjudicator:
                raise ValueError(f"{name!r} would judge its own answers -- name another model")


class Check:
    """Base class of checks, those from outside of mmkd included: see `mmkd.making.checks`."""

    config_class: ClassVar[type[CheckConfig]] = CheckConfig


T = TypeVar("T", bound=type[Check])


def _check(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Check)):
        raise TypeError("it is not a subclass of Check")
    if not issubclass(cls.config_class, CheckConfig):
        raise TypeError(f"its settings, {cls.config_class.__name__}, are not a CheckConfig")


CHECKS: Registry[Check] = Registry(
    "check",
    [
        EmptyConfig,
        CutConfig,
        RepeatsConfig,
        AgreesConfig,
        ReferenceConfig,
        ObjectsConfig,
        JudgeConfig,
    ],
    _check,
)


def add_check(cls: T) -> T:
    """Class decorator that registers a check of answers under its kinds.

    Raises:
        TypeError: `cls` is not a subclass of `Check`, or its settings are not a `CheckConfig`.
        ValueError: another check has the kind.
    """
    return CHECKS.add(cls)


if TYPE_CHECKING:
    AnyCheckConfig = CheckConfig
else:
    AnyCheckConfig = CHECKS.entry()
