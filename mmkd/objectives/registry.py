"""Objectives from outside of mmkd, by kind.

A package names its own as entry points of the group `mmkd.objectives`, by kind; one is loaded when
a recipe asks for it. A module that is imported anyway calls `add_objective`.

This module does not import torch.
"""

from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mmkd.errors import MEND
from mmkd.objectives.settings import SETTINGS

if TYPE_CHECKING:
    from mmkd.objectives.base import Objective

GROUP = "mmkd.objectives"
T = TypeVar("T", bound="type[Objective]")
_added: "dict[str, type[Objective]]" = {}


def settings_kinds(settings: Any) -> tuple[str, ...]:
    """The kinds that a recipe may write for a class of settings; none if it does not say."""
    field = None if settings is None else settings.model_fields.get("kind")
    kinds = () if field is None else get_args(field.annotation)
    return kinds if all(isinstance(kind, str) for kind in kinds) else ()


BUILT_IN = {kind: settings for settings in SETTINGS for kind in settings_kinds(settings)}
"""Settings of mmkd's own objectives, by kind."""


def kinds_of(cls: "type[Objective]") -> tuple[str, ...]:
    """The kinds that a recipe writes for a class of objectives.

    Raises:
        ValueError: it has none.
    """
    kinds = settings_kinds(getattr(cls, "config_class", None))
    if not kinds:
        raise ValueError(f"{cls.__name__} has no kind: give its config_class 'kind: Literal[...]'")
    return kinds


def add_objective(cls: T) -> T:
    """Make an objective known by its kinds; a class decorator.

    Raises:
        ValueError: another one has the kind.
    """
    for kind in kinds_of(cls):
        known = BUILT_IN.get(kind) or _added.setdefault(kind, cls)
        if known is not cls:
            raise ValueError(f"two objectives have the kind {kind!r}: {known} and {cls}")
    return cls


def find_added(kind: str) -> "type[Objective] | None":
    """The objective from outside that has the kind, if there is one.

    Raises:
        ValueError: a package's entry point does not lead to an objective of this kind.
    """
    from importlib.metadata import entry_points  # takes a tenth of a second

    for point in entry_points(group=GROUP, name=kind):
        if kind not in _added:
            try:
                add_objective(_objective(point.load(), kind))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise ValueError(
                    f"the entry point {point.value} cannot be used ({reason}){MEND}mend its "
                    "package, or uninstall it"
                ) from error
    return _added.get(kind)


def _objective(found: Any, kind: str) -> "type[Objective]":
    """What an entry point leads to, if it is an objective of the kind."""
    from mmkd.objectives.base import Objective  # imports torch

    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise TypeError("it is no objective")
    if kind not in kinds_of(found):
        raise ValueError(f"it is not of the kind {kind!r}")
    return found
