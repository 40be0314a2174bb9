"""Settings of the checks of answers that a model has made.

A check may only refuse answers, or also score them. If several score them, the first one in the
recipe's list that does so decides which answer is the best.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from mmkd.recipe.base import Strict
from mmkd.runtime.fields import NAME, NAMED, Prose
from mmkd.runtime.registry import Registry


class CheckConfig(Strict):
    """Base of the settings of a check."""

    scores: ClassVar[bool] = False
    """Whether the check scores answers, so that a best and a worst one exist."""

    kind: str

    @property
    def model(self) -> str | None:
        """Name of the model that the check asks; None if it asks none."""
        return None


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
    """Refuse answers that differ from the record's own answer."""

    scores: ClassVar[bool] = True

    kind: Literal["reference"]
    match: Literal["text", "choice", "number", "math"] = Field(
        "text",
        description="text: equal words; choice: the same first letter of an option, such as B; "
        "number: the same last number; math: equal as expressions, by math-verify",
    )


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
    """Refuse answers that another model rates low. A single answer is rated from 1 to 10. Several
    answers are rated in pairs, each pair in both orders."""

    scores: ClassVar[bool] = True

    kind: Literal["judge"]
    by: str = Field(
        max_length=NAME,
        pattern=NAMED,
        description="the model: a teacher's name, or a name under 'servers'; never one that has "
        "made the answer",
    )
    least: float = Field(7.0, ge=1, le=10, description="smallest mean rating")
    criteria: Prose = Field(
        "how correct, complete and helpful it is, given the image",
        description="what the judge is told to rate",
    )

    @property
    def model(self) -> str | None:
        return self.by


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
