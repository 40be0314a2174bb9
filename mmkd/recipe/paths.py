"""Resolve relative paths in a recipe: from the working directory, or from the recipe's folder.

A key whose type is `LocalPath` (`mmkd.recipe.base`) holds a path. A relative path that exists in
the working directory stays as it is. A path that exists only in the folder of the file in which it
is written is replaced: relative to the working directory if it is below it, otherwise absolute. The
recipe that a run writes down holds the path that was used.
"""

import glob
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from mmkd.recipe.base import PathKey
from mmkd.recipe.sources import HUB
from mmkd.runtime.files import from_here
from mmkd.runtime.formats import FormatError, parse_yaml

ANY = "*"
"""In a key: any name that the user gives, such as that of an entry of `make`."""
RANGE = re.compile(r"\{\d+\.\.\d+\}")
Key = tuple[str, ...]


@cache
def path_keys(form: type[BaseModel]) -> frozenset[Key]:
    """Keys of a model and its parts that hold paths; the items of a list have the list's key, and
    `ANY` stands for the names in a mapping of names."""
    found = set()
    for name, field in form.model_fields.items():
        marked = any(isinstance(m, PathKey) for m in field.metadata)
        found |= {(name, *rest) for rest in _keys_in(field.annotation, marked)}
    return frozenset(found)


def _keys_in(annotation: Any, marked: bool) -> set[Key]:
    if isinstance(annotation, PathKey) or marked:
        return {()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = set(path_keys(annotation))
        short: str | None = getattr(annotation, "written_short", None)
        # A part may be written as the value of one field, or as a path.
        return keys if short is None else keys | {k[1:] for k in keys if k[0] == short} | {()}
    if get_origin(annotation) is dict:
        return {(ANY, *key) for key in _keys_in(get_args(annotation)[1], False)}
    inner = [*get_args(annotation), *getattr(annotation, "__metadata__", ())]
    return {key for argument in inner for key in _keys_in(argument, False)}


def resolved(raw: dict[str, Any], folder: Path, form: type[BaseModel]) -> dict[str, Any]:
    """The content of a recipe file, with `find` applied to its paths.

    Args:
        raw: content of the file.
        folder: of the file.
        form: pydantic model of the recipe.
    """
    for key in path_keys(form):
        raw = _at(raw, key, folder)
    variants = raw.get("variants")
    if isinstance(variants, dict):
        raw = {
            **raw,
            "variants": {label: _variant(v, folder, form) for label, v in variants.items()},
        }
    return raw


def _variant(overrides: Any, folder: Path, form: type[BaseModel]) -> Any:
    if not isinstance(overrides, list):
        return overrides
    return [resolved_override(o, folder, form) if isinstance(o, str) else o for o in overrides]


def resolved_override(override: str, folder: Path, form: type[BaseModel]) -> str:
    """The same for one `key.path=value`; an override that cannot be read stays as it is."""
    key, _, text = override.partition("=")
    parts = tuple(p for p in re.split(r"[.\[\]]+", key) if p and not p.isdigit())
    inner = [known[len(parts) :] for known in path_keys(form) if _begins(known, parts)]
    try:
        value = parse_yaml(text) if inner else None
    except FormatError:
        return override
    changed = value
    for rest in inner:
        changed = _at(changed, rest, folder)
    return override if changed == value else f"{key}={json.dumps(changed, ensure_ascii=False)}"


def _begins(known: Key, parts: Key) -> bool:
    """Whether a key with `ANY` begins with names."""
    if len(parts) > len(known):
        return False
    return all(name in (ANY, part) for name, part in zip(known, parts, strict=False))


def _at(node: Any, key: Key, folder: Path) -> Any:
    """A part of a recipe, with `find` applied to the path or the list of paths under a key."""
    if isinstance(node, list):
        return [_at(item, key, folder) for item in node]
    if not key:
        return find(node, folder) if isinstance(node, str) else node
    if not isinstance(node, dict):
        return node
    if key[0] == ANY:
        return {name: _at(value, key[1:], folder) for name, value in node.items()}
    if key[0] not in node:
        return node
    return {**node, key[0]: _at(node[key[0]], key[1:], folder)}


def find(path: str, folder: Path) -> str:
    """A path that exists only in `folder`, relative to the working directory.

    A path is not changed if it exists in the working directory or nowhere, is absolute, or is not a
    file of this machine (`hub:`, a URL).
    """
    other = path.startswith(HUB) or "://" in path or not path
    if other or os.path.isabs(path) or _is_there(path) or not _is_there(str(folder / path)):
        return path
    return from_here(Path(os.path.abspath(folder / path)))


def _is_there(path: str) -> bool:
    """Whether a file, a folder, or a file that matches a pattern exists."""
    if os.path.exists(path):
        return True
    pattern = RANGE.sub("*", path)
    return any(c in pattern for c in "*?[") and any(
        True for _ in glob.iglob(pattern, recursive=True)
    )
