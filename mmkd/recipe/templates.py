"""Texts with placeholders, such as {name}, that recipes give."""

from collections.abc import Sequence
from string import Formatter


def placeholders(text: str, known: Sequence[str]) -> set[str]:
    """The placeholders in a text. `str.format` fills them; {{ and }} are braces.

    Args:
        text: of the recipe.
        known: names of placeholders.

    Raises:
        ValueError: one is unknown, or a brace is single.
    """
    try:
        parts = [(name, spec, how) for _, name, spec, how in Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(f"{text!r} has a single brace -- write it twice") from error
    if any(spec or how for _, spec, how in parts):
        raise ValueError(
            f"{text!r} has a placeholder with ':' or '!' -- give its name alone, or write the "
            "braces twice"
        )
    found = {name for name, _, _ in parts if name is not None}
    if unknown := sorted(found - set(known)):
        raise ValueError(
            f"{text!r} has the placeholder {{{unknown[0]}}} -- known: {written(known)}; write "
            "other braces twice"
        )
    return found


def written(names: Sequence[str]) -> str:
    """Placeholders as they are written."""
    return " ".join(f"{{{name}}}" for name in names)


def escaped(text: str) -> str:
    """A template that stands for the text itself."""
    return text.replace("{", "{{").replace("}", "}}")
