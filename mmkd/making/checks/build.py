"""Build the checks of an entry of `make`."""

from typing import Any

from mmkd.making.checks.agreement import Agreement
from mmkd.making.checks.base import AnswerCheck
from mmkd.making.checks.existence import Existence, ExistenceCheckConfig
from mmkd.making.checks.form import Cut, Empty, Repeats
from mmkd.making.checks.judge import Judge
from mmkd.making.checks.objects import Objects
from mmkd.making.checks.reference import Reference
from mmkd.making.questions import Questions
from mmkd.recipe import CHECKS, MakeConfig

CLASSES: tuple[type[AnswerCheck], ...] = (
    Empty,
    Cut,
    Repeats,
    Agreement,
    Reference,
    Objects,
    Judge,
)
_BUILT_IN = {kind: cls for cls in CLASSES for kind in CHECKS.kinds_of(cls)}


def build_checks(config: MakeConfig, questions: Questions) -> list[AnswerCheck]:
    """The checks of an entry of `make`, in order.

    Raises:
        RecipeError: a check needs a package that is not installed.
    """
    built: list[AnswerCheck] = []
    if config.objects is not None and config.objects.existence is not None:
        built.append(Existence(ExistenceCheckConfig(), questions, config.sampling.n))
    for settings in config.checks:
        cls: Any = _BUILT_IN.get(settings.kind) or CHECKS.find(settings.kind)
        built.append(cls(settings, questions, config.sampling.n))
    return built
