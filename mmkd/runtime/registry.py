"""Classes that a recipe names by their kind, those from outside of mmkd included.

A package names its own as entry points of the registry's group, by kind; one is loaded when a
recipe asks for it. A module that is imported anyway registers its classes itself.

This module does not import torch.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Generic, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from mmkd.errors import HINT

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


def settings_kinds(settings: Any) -> tuple[str, ...]:
    """The kinds that a recipe may write for a class of settings; none if it does not say."""
    field = None if settings is None else settings.model_fields.get("kind")
    kinds = () if field is None else get_args(field.annotation)
    return kinds if all(isinstance(kind, str) for kind in kinds) else ()


class Registry(Generic[T]):
    """Classes of one sort, each with its settings as `config_class`: a pydantic model whose
    `kind: Literal[...]` holds the kinds that a recipe writes.

    Args:
        what: the sort in messages, such as "objective"; entry points are of the group
            `mmkd.objectives` then.
        settings: classes of settings that come with mmkd.
        check: raises TypeError or ValueError for a class that cannot be registered.
    """

    def __init__(
        self, what: str, settings: Sequence[type[BaseModel]], check: Callable[[Any], None]
    ):
        self.what = what
        self.group = f"mmkd.{what}s"
        self.settings = tuple(settings)
        self.built_in = {kind: s for s in settings for kind in settings_kinds(s)}
        self._check = check
        self._added: dict[str, type[T]] = {}

    def kinds_of(self, cls: type[T]) -> tuple[str, ...]:
        """The kinds that a recipe writes for a class.

        Raises:
            ValueError: it has none.
        """
        kinds = settings_kinds(getattr(cls, "config_class", None))
        if not kinds:
            raise ValueError(
                f"{cls.__name__} has no kind: give its config_class 'kind: Literal[...]'"
            )
        return kinds

    def add(self, cls: C) -> C:
        """Make a class known by its kinds.

        Raises:
            TypeError, ValueError: it is not of this sort, or another one has the kind.
        """
        self._check(cls)
        for kind in self.kinds_of(cls):
            known = self.built_in.get(kind) or self._added.setdefault(kind, cls)
            if known is not cls:
                raise ValueError(f"two {self.what}s have the kind {kind!r}: {known} and {cls}")
        return cls

    def find(self, kind: str) -> type[T] | None:
        """The class from outside of mmkd that has the kind, if there is one.

        Raises:
            ValueError: a package's entry point does not lead to a class of this kind.
        """
        from importlib.metadata import entry_points  # takes a tenth of a second

        if kind in self.built_in:
            return None
        for point in entry_points(group=self.group, name=kind):
            if kind not in self._added:
                try:
                    self._add_loaded(point.load(), kind)
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    raise ValueError(
                        f"the entry point {point.value} cannot be used ({reason}){HINT}fix its "
                        "package, or uninstall it"
                    ) from error
        return self._added.get(kind)

    def _add_loaded(self, found: Any, kind: str) -> None:
        """Register what an entry point leads to."""
        self._check(found)
        if kind not in self.kinds_of(found):
            raise ValueError(f"it is not of the kind {kind!r}")
        self.add(found)

    def settings_of(self, kind: str) -> type[BaseModel] | None:
        """Settings of the class from outside that has the kind, if there is one.

        Raises:
            ValueError: as `find`.
        """
        cls: Any = self.find(kind)
        return None if cls is None else cls.config_class

    def entry(self) -> Any:
        """The type of an entry of a recipe: the settings of any class, by their `kind`."""
        return Annotated[
            SerializeAsAny[reduce(or_, self.settings)],  # type: ignore[misc]
            Field(discriminator="kind"),
            WrapValidator(self._validated),
        ]

    def _validated(self, value: Any, known: ValidatorFunctionWrapHandler) -> Any:
        """Settings of a class from outside, else what `known` makes of them."""
        kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        if not isinstance(kind, str) or kind in self.built_in:
            return known(value)
        settings = self.settings_of(kind)
        return known(value) if settings is None else settings.model_validate(value)
