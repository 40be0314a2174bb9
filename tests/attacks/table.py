"""Attacks: what a hostile recipe, record, picture, model or folder tries, and the refusal."""

from collections.abc import Callable
from typing import Any

from tests.support.bad_inputs import Case

ATTACKS: list[Case] = []


def attack(theme: str, did: str, *parts: str, leaves: str | None = None) -> Callable[[Any], Any]:
    """Add a function that makes a good world hostile to the table.

    Args:
        theme: what is attacked: `secrets`, `code`, `pictures`, `paths`, `records`, `recipes`,
            `folders`, `values`.
        did: the attack in words, for docs/security.md.
        parts: words that the one-line message must contain.
        leaves: a folder that may stay because it is whole.
    """

    def keep(prepare: Callable[[Any], list[str] | None]) -> Any:
        ATTACKS.append(Case(theme, prepare.__name__, did, parts, prepare, leaves))
        return prepare

    return keep
