"""Base classes of all parts of a recipe."""

from dataclasses import dataclass
from typing import Annotated

from mmkd.runtime.fields import Bounded


class Strict(Bounded):
    """Base of all parts of a recipe: unknown keys are errors."""


@dataclass(frozen=True)
class PathKey:
    """Marks the type of a key that holds a path."""


LocalPath = Annotated[str, PathKey()]
"""Type of a key that holds a file, a folder or a pattern of files: `mmkd.recipe.paths`."""

BOTH = "both of them or neither -- "
"""Beginning of messages about two keys of which exactly one must be given."""
