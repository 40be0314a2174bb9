"""Merge one recipe over another, and set single keys by their path.

Texts are not interpolated: `${price}` stays `${price}`.

OmegaConf sets keys by the same paths, but takes `${price}` for an interpolation and fails when it
is resolved. The command line of pydantic-settings takes a list whole: it has no path to a key of
one item, such as `stages.0.optimizer.lr`.
"""

import re
from typing import Any

_PART = re.compile(r"\[(-?\d+)\]|\.?([^.\[\]]+)")
Key = str | int


def merged(below: Any, above: Any, key: str = "") -> Any:
    """Merge `above` over `below`: mappings are merged by key, other values are replaced.

    Args:
        below, above: values of YAML.
        key: path of the two values, for the message.

    Raises:
        ValueError: one has a mapping where the other has a list; the message begins with the key.
    """
    kinds = {type(below), type(above)}
    if kinds == {dict, list}:
        raise ValueError(f"{key}: one file has a mapping here, the other a list")
    if kinds != {dict}:
        return above
    result = dict(below)
    for name, value in above.items():
        inner = f"{key}.{name}" if key else str(name)
        result[name] = merged(below[name], value, inner) if name in below else value
    return result


def with_key(raw: Any, path: str, value: Any) -> Any:
    """A copy of `raw` with another value at a dotted path.

    Args:
        raw: mappings and lists of YAML.
        path: `stages.0.optimizer.lr` or `stages[0].optimizer.lr`. Missing mappings are added,
            missing items of lists are not.
        value: the new value.

    Raises:
        ValueError: `path` is malformed, or does not exist in `raw`.
    """
    return _with(raw, _parts(path), value, "")


def _parts(path: str) -> list[str]:
    parts, end = [], 0
    while end < len(path):
        found = _PART.match(path, end)
        if found is None:
            raise ValueError(f"{path!r} is not a path of keys")
        parts.append(found[1] or found[2])
        end = found.end()
    if not parts or path.startswith("."):
        raise ValueError(f"{path!r} is not a path of keys")
    return parts


def _with(node: Any, parts: list[str], value: Any, above: str) -> Any:
    if not parts:
        return value
    part, *rest = parts
    here = f"{above}.{part}" if above else part
    if isinstance(node, list):
        if not re.fullmatch(r"-?\d+", part) or not -len(node) <= int(part) < len(node):
            raise ValueError(f"{here}: {above} is a list of {len(node)} items, counted from 0")
        items = list(node)
        items[int(part)] = _with(node[int(part)], rest, value, here)
        return items
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ValueError(f"{here}: {above} is {node!r}, which has no keys")
    key: Key = part
    if part not in node and re.fullmatch(r"-?\d+", part) and int(part) in node:
        key = int(part)
    return {**node, key: _with(node.get(key), rest, value, here)}
