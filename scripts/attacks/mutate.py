"""Mutations: of values and bytes, and of a recipe along its schema."""

import copy
import random
import string
from typing import Any

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 10**18, -(10**18), 10**300),
    *(0.0, -0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *("", " ", ".", "..", "../up", "/etc/passwd", "~", "a/b", "x" * 300, "x" * 30_000, "1e-4"),
    *("a\nmmkd: done", "a\x1b[2Jb", "a\0b", "a\u202eb", "a -- b", "${oc.env:HOME}", "{{ x }}"),
    *(
        "[red]x[/]",
        "[/x]",
        "<image>",
        "<script>",
        "http://localhost:1/x",
        "hub:a/b",
        "é😀",
        "*",
        "[",
    ),
    *([], {}, [[]], [None], {"a": {}}, {"kind": "ce"}, [{"kind": "kl"}], "all", "none", "auto"),
]
TOKENS = [
    *(
        b"&a ",
        b"*a",
        b"!!int ",
        b"!x ",
        b"<<: ",
        b"? ",
        b"---\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b": ",
        b"\t",
    ),
    *(b'"', b"'", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"#", b"|", b"1e999", b"NaN", b"\\ud800"),
]


def hostile(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(HOSTILE))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a value but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


def mutated(draw: random.Random, value: Any) -> Any:
    """A mapping or list with one part that is replaced, left out, wrapped, doubled or renamed."""
    found = copy.deepcopy(value)
    options = places(found)
    if not options:
        return hostile(draw)
    *path, last = draw.choice(options)
    node = found
    for key in path:
        node = node[key]
    match draw.randrange(6):
        case 0 | 1:
            node[last] = hostile(draw)
        case 2:
            del node[last]
        case 3:
            node[last] = draw.choice([[node[last]], {"a": node[last]}, repr(node[last])])
        case 4 if isinstance(node, list):
            node += [copy.deepcopy(node[last])] * draw.choice([1, 3, 200])
        case 5 if isinstance(node, dict):
            node[str(last) + draw.choice(string.ascii_letters)] = node.pop(last)
        case _:
            node[last] = hostile(draw)
    return found


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes that are cut, emptied, overwritten, doubled, or have something put in."""
    at = draw.randrange(max(1, len(content)))
    match draw.randrange(7):
        case 0:
            return content[:at]
        case 1:
            return b""
        case 2:
            return content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
        case 3:
            noise = bytes(draw.randrange(256) for _ in range(8))
            return content[:at] + noise + content[at + 8 :]
        case 4:
            return content + content[at:]
        case 5:
            return draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n"]) + content
        case _:
            return content[:at] + draw.choice(TOKENS) + content[at + draw.randrange(3) :]


class Schema:
    """Draws values for the keys of a JSON schema."""

    def __init__(self, schema: dict[str, Any]):
        self.top, self.definitions = schema, schema["$defs"]

    def spoil(self, draw: random.Random, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe with one key, drawn along the schema, that has another value or is new."""
        found = copy.deepcopy(recipe)
        self._spoil(draw, found, self.top)
        return found

    def _spoil(self, draw: random.Random, node: dict[str, Any], schema: dict[str, Any]) -> None:
        keys = [*schema["properties"]]
        # What has keys of its own counts more, or most attacks would end at the top.
        weights = [6 if isinstance(node.get(k), dict | list) and node[k] else 1 for k in keys]
        (key,) = draw.choices(keys, weights)
        inner, form = node.get(key), schema["properties"][key]
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            inner = draw.choice(inner)
            form = next((s["items"] for s in self._choices(form) if "items" in s), form)
        shapes = [s for s in self._choices(form) if "properties" in s]
        if isinstance(inner, dict) and inner and shapes and draw.random() < 0.9:
            kinds = [s for s in shapes if self._is(s, inner.get("kind"))]
            return self._spoil(draw, inner, draw.choice(kinds or shapes))
        node[key] = hostile(draw) if draw.random() < 0.5 else self.value(draw, form)
        return None

    @staticmethod
    def _is(schema: dict[str, Any], kind: Any) -> bool:
        said = schema["properties"].get("kind", {})
        return kind is not None and kind in said.get("enum", [said.get("const")])

    def _choices(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]]
        inner = schema.get("anyOf") or schema.get("oneOf")
        return [s for choice in inner for s in self._choices(choice)] if inner else [schema]

    def value(self, draw: random.Random, schema: dict[str, Any], depth: int = 3) -> Any:
        """A value of the schema's type, often on a bound of it."""
        form = draw.choice(self._choices(schema))
        if "enum" in form or "const" in form:
            return draw.choice(form.get("enum", [form.get("const")]))
        match form.get("type"):
            case "integer" | "number":
                low = form.get("minimum", form.get("exclusiveMinimum", 0))
                high = form.get("maximum", form.get("exclusiveMaximum", 1))
                least, most = min(low + 1, high), min(high, low + 8)
                return draw.choice([low, high, least, most, low - 1, high + 1])
            case "boolean":
                return draw.random() < 0.5
            case "array":
                items = form.get("items", {})
                return [self.value(draw, items, depth - 1) for _ in range(draw.randrange(3))]
            case "object" if "properties" in form and depth:
                keys = [k for k in form["properties"] if draw.random() < 0.2]
                keys += [k for k in form.get("required", []) if k not in keys]
                return {k: self.value(draw, form["properties"][k], depth - 1) for k in keys}
            case "string":
                return draw.choice(["model", "records.json", "picture.png", "x", "all", "mimic"])
        return hostile(draw)
