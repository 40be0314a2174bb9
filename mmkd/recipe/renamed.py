"""Old names of recipe keys and conversions, which recipes may still use.

`load_recipe` replaces them before it checks a recipe, and logs a note for each. So the recipes of
older run folders load as well.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from mmkd.errors import HINT
from mmkd.runtime.formats import FormatError, parse_yaml

Path = tuple[str, ...]
RENAMED_KEYS: dict[Path, str] = {
    ("data", "on_bad_sample"): "on_bad_record",
    ("data", "picture_cache"): "image_cache",
    ("stages", "data", "on_bad_sample"): "on_bad_record",
    ("stages", "data", "picture_cache"): "image_cache",
    ("stages", "checkpoint", "every"): "interval",
    ("stages", "checkpoint", "keep"): "keep_last",
    ("stages", "engine", "patience"): "timeout_s",
    ("stages", "validation", "every"): "interval",
}
"""New names of keys. A path has the keys from the top of the recipe to the old one, without the
indices of list items."""
RENAMED_KINDS = {"layers": "depth_pruning", "mlp": "width_pruning"}
"""New kinds of conversions."""
CONVERT = (("student", "convert"), ("stages", "convert"))
"""Keys that hold conversions."""

Report = Callable[[str], None]


def _log(note: str) -> None:
    from mmkd.runtime.progress import say_once  # imports rich

    say_once(note)


def rename(node: Any, path: Path = (), report: Report = _log) -> Any:
    """A recipe or a part of it, with new names in place of old ones.

    Args:
        node: values of YAML.
        path: keys from the top of the recipe to `node`.
        report: is called with one line for each old name.

    Raises:
        ValueError: a mapping has both an old key and its new name; the message begins with the
            path of the mapping.
    """
    if isinstance(node, list):
        if path[:1] == ("variants",):
            return [rename_override(o, (), report) if isinstance(o, str) else o for o in node]
        return [rename(item, path, report) for item in node]
    if not isinstance(node, dict):
        return _kind(node, path, report)
    changed = {}
    for old, value in node.items():
        new = _key(old, path, report)
        if new != old and new in node:
            both = f"both {old!r} and {new!r}, its new name{HINT}leave out {old!r}"
            raise ValueError(f"{'.'.join(path)}: {both}")
        changed[new] = rename(value, (*path, str(new)), report)
    return changed


def rename_override(override: str, path: Path = (), report: Report = _log) -> str:
    """The same for one `key.path=value`; an override that cannot be read stays as it is.

    Args:
        override: as a user writes it.
        path: keys from the top of the recipe to where the override's keys begin.
        report: as in `rename`.
    """
    keys, equals, text = override.partition("=")
    parts = []
    for part in [p for p in re.split(r"[.\[\]]+", keys) if p]:
        if not re.fullmatch(r"-?\d+", part):
            part = _key(part, path, report)
            path = (*path, part)
        parts.append(part)
    new_keys = ".".join(parts)
    if new_keys == ".".join(p for p in re.split(r"[.\[\]]+", keys) if p):
        new_keys = keys
    try:
        value = parse_yaml(text) if equals else None
    except FormatError:
        return override
    new_value = rename(value, path, report)
    if new_value is not value and new_value != value:  # nan differs from itself
        text = json.dumps(new_value, ensure_ascii=False)
    return f"{new_keys}{equals}{text}"


def _key(old: Any, path: Path, report: Report) -> Any:
    new = RENAMED_KEYS.get((*path, old)) if isinstance(old, str) else None
    if new is None:
        return old
    report(f"note: '{'.'.join((*path[-1:], old))}' is now called {new!r}")
    return new


def _kind(value: Any, path: Path, report: Report) -> Any:
    is_kind = isinstance(value, str) and path[-1:] == ("kind",) and path[:-1] in CONVERT
    if not is_kind or value not in RENAMED_KINDS:
        return value
    report(f"note: the conversion {value!r} is now called {RENAMED_KINDS[value]!r}")
    return RENAMED_KINDS[value]
