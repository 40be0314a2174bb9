"""Registry of objectives by kind, including those from plugins: `mmkd.runtime.registry`.

This module does not import torch.
"""

from typing import TYPE_CHECKING, Any, TypeVar

from mmkd.objectives.base_settings import HeadObjectiveConfig
from mmkd.objectives.settings import SETTINGS
from mmkd.runtime.registry import Registry

if TYPE_CHECKING:
    from mmkd.objectives.base import Objective

T = TypeVar("T", bound="type[Objective]")


def _check(cls: Any) -> None:
    """
    Raises:
        TypeError: `cls` is not a subclass of `Objective`.
        ValueError: `cls` defines what belongs to its settings.
    """
    from mmkd.objectives.base import Objective  # imports torch
    from mmkd.objectives.scoring import HeadObjective

    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise TypeError("it is not a subclass of Objective")
    settings = getattr(cls, "config_class", None)
    if settings is None:
        return  # it has no kind, and `Registry.add` refuses it
    for name in ("needs", "reads_hidden"):
        if getattr(cls, name) is not getattr(Objective, name):
            raise ValueError(
                f"{cls.__name__} defines {name!r}: move it to its settings, {settings.__name__}"
            )
        if name in settings.model_fields:
            raise ValueError(
                f"a recipe could set {name!r} of {settings.__name__}: annotate it as ClassVar"
            )
    if issubclass(cls, HeadObjective) != issubclass(settings, HeadObjectiveConfig):
        raise ValueError(
            f"{cls.__name__} and {settings.__name__} differ: settings of a HeadObjective, and no "
            "others, are a HeadObjectiveConfig"
        )


OBJECTIVES: "Registry[Objective]" = Registry("objective", SETTINGS, _check)


def add_objective(cls: T) -> T:
    """Class decorator that registers an objective under its kinds.

    Raises:
        TypeError: `cls` is not a subclass of `Objective`.
        ValueError: another objective has the kind, or `cls` defines what belongs to its settings.
    """
    return OBJECTIVES.add(cls)
