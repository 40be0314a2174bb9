"""Objectives from outside of mmkd.

A package names its own as entry points of the group `mmkd.objectives`, by kind; one is loaded when
a recipe asks for it. A module that is imported anyway calls `add_objective`.
"""

from importlib.metadata import entry_points
from typing import TypeVar, get_args

from mmkd.objectives.base import Objective

GROUP = "mmkd.objectives"
T = TypeVar("T", bound=type[Objective])
_added: dict[str, type[Objective]] = {}


def kinds_of(cls: type[Objective]) -> tuple[str, ...]:
    """The kinds that a recipe writes for a class of objectives."""
    return get_args(cls.config_class.model_fields["kind"].annotation)


def add_objective(cls: T) -> T:
    """Make an objective known by its kinds; a class decorator.

    Raises:
        ValueError: another one has the kind.
    """
    for kind in kinds_of(cls):
        known = _added.setdefault(kind, cls)
        if known is not cls:
            raise ValueError(f"two objectives have the kind {kind!r}: {known} and {cls}")
    return cls


def find_added(kind: str) -> type[Objective] | None:
    """The objective from outside that has the kind, if there is one.

    Raises:
        ValueError: a package's entry point does not lead to an objective of this kind.
    """
    for point in entry_points(group=GROUP, name=kind):
        if kind not in _added:
            found = point.load()
            if not (isinstance(found, type) and issubclass(found, Objective)):
                raise ValueError(f"the entry point {point.value} is no objective")
            if kind not in kinds_of(found):
                raise ValueError(f"the entry point {point.value} is not of the kind {kind!r}")
            add_objective(found)
    return _added.get(kind)
