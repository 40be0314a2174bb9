"""The base class of all settings: unknown keys are errors, and every value has bounds.

A number must be finite, and `true` is not a number. A text has a maximum length and no control
characters. Each key adds its own bounds (`Field(ge=1, le=MOST)`), which the JSON schema contains.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mmkd.errors import HINT, RecipeError, is_control

MOST = 10**9
"""Upper bound of all counts."""
LEAST_TEMPERATURE = 1e-3
"""Smallest temperature. Logits divided by less overflow."""
MOST_SEED = 2**32 - 1
"""Largest seed that numpy accepts."""
NAME = 100
"""Most characters of a name that becomes part of a folder's name. File systems allow 255 bytes."""
TEXT = 20_000
"""Most characters of any text."""


NAMED = r"^[A-Za-z0-9_-]+$"
FOLDER = r"^\.*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"
LICENSE = r"^[A-Za-z0-9][A-Za-z0-9.+-]*$"
LICENSE_NAME = r"^[A-Za-z0-9][A-Za-z0-9 .,()_+-]*$"
LICENSE_LINK = r"^(https?://[A-Za-z0-9][^\s<>()\[\]|`\"'\\]*|[A-Za-z0-9][\w.-]*)$"
DATA_SET = r"^[\w.-]+(/[\w.-]+)?$"
LANGUAGE = r"^[A-Za-z][A-Za-z0-9-]*$"
_IN_WORDS = {
    NAMED: "use letters A-Z and a-z, digits, _ and -",
    FOLDER: "use letters A-Z and a-z, digits, _, - and ., of which not all are dots",
    LICENSE: "give the Hub's name of a license, such as apache-2.0 or other",
    LICENSE_NAME: "use letters A-Z and a-z, digits, spaces and . , ( ) _ + -",
    LICENSE_LINK: "give an address that begins with https://, or the name of a file",
    DATA_SET: "give a Hub id, such as me/data",
    LANGUAGE: "give an ISO 639 code, such as en",
}


@dataclass(frozen=True)
class ProseKey:
    """Marks the type of a key whose text may have several lines."""


Prose = Annotated[str, ProseKey()]


class Bounded(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=TEXT)

    @model_validator(mode="before")
    @classmethod
    def _are_plain(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name in cls.model_fields:
                _check(name, value, _kinds(cls, name))
        return given


def _check(name: str, value: Any, kinds: frozenset[Any]) -> None:
    """
    Raises:
        ValueError: a boolean in place of a number, or a text with control characters.
    """
    if Any in kinds:
        return
    if isinstance(value, dict):
        # A mapping for a nested model is checked by that model.
        value = [*value.values()] if dict in kinds else []
    if isinstance(value, list | tuple):
        for item in value:
            _check(name, item, kinds)
    elif isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
        raise ValueError(f"{name!r} is {str(value).lower()} -- give a number")
    elif isinstance(value, str) and str in kinds:
        allowed = "\n\t" if ProseKey in kinds else ""
        odd = next((c for c in value if is_control(c) and c not in allowed), None)
        if odd is not None:
            raise ValueError(f"{name!r} is {value[:80]!r} -- remove the character {odd!a}")


@cache
def _kinds(model: type[BaseModel], name: str) -> frozenset[Any]:
    field = model.model_fields[name]
    marks = {type(m) for m in field.metadata}
    return frozenset(_types(field.annotation) | marks)


def _types(annotation: Any) -> set[Any]:
    """The plain types, and the types of marks, that an annotation is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return set()
    marks = {type(m) for m in getattr(annotation, "__metadata__", ())}
    inner = get_args(annotation)
    own = getattr(annotation, "__origin__", annotation)
    if own is dict:
        inner = inner[1:]  # only values are checked
    found = {own} if own in (Any, dict, bool, int, float, str) else set()
    return found.union(marks, *(_types(a) for a in inner))


def wanted(problem: Any) -> str:
    """What a key takes, in words.

    Args:
        problem: one of the `errors` of a ValidationError.
    """
    said = str(problem["msg"])
    if problem["type"] == "string_pattern_mismatch":
        return _IN_WORDS.get(problem["ctx"]["pattern"], said[:1].lower() + said[1:])
    return said[:1].lower() + said[1:]


def explained(error: ValueError) -> RecipeError | None:
    """The one-line error for settings that a command was given; None for other errors.

    Args:
        error: a `ValidationError` of pydantic, or another error.
    """
    if not isinstance(error, ValidationError):
        return None
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    what, hint = (
        said.rsplit(HINT, 1) if HINT in said else (f"got {first['input']!r}", wanted(first))
    )
    return RecipeError(what, where=".".join(map(str, first["loc"])) or None, hint=hint)
