"""One entry of a stage's `objectives` in a recipe: the settings of any objective, by its kind.

This module does not import torch.
"""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator

from mmkd.objectives.registry import BUILT_IN, find_added
from mmkd.objectives.settings import SETTINGS


def _with_added(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    """Settings of an objective from outside, else what `known` makes of them."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind in BUILT_IN:
        return known(value)
    cls = find_added(kind)
    return known(value) if cls is None else cls.config_class.model_validate(value)


if TYPE_CHECKING:
    AnyObjectiveConfig = Any
else:
    AnyObjectiveConfig = Annotated[
        SerializeAsAny[Union[SETTINGS]],  # noqa: UP007
        Field(discriminator="kind"),
        WrapValidator(_with_added),
    ]
