"""Attacks: what a hostile recipe, record, image, model or folder tries, and the refusal."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.bad_inputs import Case
from tests.support.bad_inputs.table import RUN

ATTACKS: list[Case] = []


def attack(theme: str, did: str, *parts: str) -> Callable[[Any], Any]:
    """Add a function that makes a good world hostile to the table.

    Args:
        theme: what is attacked: `secrets`, `cards`, `code`, `paths`, `records`, `recipes`,
            `values`.
        did: the attack in words.
        parts: words that the one-line message must contain.
    """

    def keep(prepare: Callable[[Any], list[str] | None]) -> Any:
        add(theme, prepare.__name__, did, parts, prepare)
        return prepare

    return keep


def add(
    theme: str,
    name: str,
    did: str,
    parts: tuple[str, ...],
    prepare: Callable[[Any], list[str] | None],
) -> None:
    """Add an attack of several that differ in a value only; `name` is that of its test."""
    ATTACKS.append(Case(theme, name, did, parts, prepare))


def by_recipe(theme: str, name: str, did: str, keys: dict[str, Any], *parts: str) -> None:
    """Add an attack by keys of a good recipe."""
    add(theme, name, did, parts, lambda world: world.raw.update(keys))


def by_override(theme: str, name: str, did: str, word: str, *parts: str) -> None:
    """Add an attack by a `key=value` after a good recipe."""
    add(theme, name, did, parts, lambda world: [*RUN, word])


def attacks() -> list[Case]:
    """All attacks of the modules `on_*`."""
    for module in sorted(Path(__file__).parent.glob("on_*.py")):
        importlib.import_module(f"tests.attacks.{module.stem}")
    return ATTACKS
