"""Readers of YAML and JSON that return plain values and have limits.

mmkd reads all YAML with `parse_yaml`, and all JSON from other programs with `parse_json`. They
raise only `FormatError`, whose text is one line.

- YAML becomes mappings, lists, text, numbers, booleans and null. A date becomes text. All other
  tags are refused, so that no Python object is created.
- A key that appears twice in one mapping is refused. The libraries would use the last one.
- The depth and the number of values are limited. A kilobyte of YAML with aliases can describe a
  billion values.
"""

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

import yaml

MOST_BYTES = 2**22
"""Largest YAML file, in bytes. Reading a megabyte takes seconds."""
MOST_DEPTH = 100
"""Most levels of nested mappings and lists."""
MOST_VALUES = 200_000
"""Most values of a YAML file, after aliases are expanded."""
_TOO_DEEP = f"mappings or lists are nested more than {MOST_DEPTH} deep"
MOST_BITS = 64
"""Most bits of an integer in YAML, so that other libraries can use it."""
_TAG = "tag:yaml.org,2002:"
_KEYS = ("str", "int", "merge", "timestamp", "value")
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


class FormatError(ValueError):
    """A text is not YAML or JSON that mmkd reads. Its message is one line."""


def parse_yaml(text: str | bytes, *, task: bool = False) -> Any:
    """The value of a YAML document; None where it is empty.

    Args:
        text: the document. Bytes must be UTF-8, with or without a byte order mark.
        task: read an lmms-eval task file. `!function utils.score` becomes the text "utils.score",
            and the last of two equal keys is used, as in lmms-eval.

    Raises:
        FormatError: the text cannot be read. The message has the line and the column.
    """
    if len(text) > MOST_BYTES:
        raise FormatError(f"longer than {MOST_BYTES // 2**20} MiB")
    text = decoded(text) if isinstance(text, bytes) else text
    try:
        return (_TaskLoader if task else _Loader)(text).get_single_data()
    except yaml.YAMLError as error:
        raise FormatError(_reason(error)) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. NaN and Infinity are read as numbers, as Python writes them.

    Args:
        text: the document. Bytes must be UTF-8, with or without a byte order mark.

    Raises:
        FormatError: the text cannot be read. The message has the line and the column if they are
            known.
    """
    if isinstance(text, bytes):
        text = decoded(text)
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise FormatError(f"{error.msg}: line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise FormatError(_TOO_DEEP) from error
    except ValueError as error:  # a number of more than 4300 digits, or a key twice
        raise FormatError(str(error).partition(";")[0]) from error
    if isinstance(found, dict | list):
        _check_depth(found)
    if _HALF_ESCAPED.search(text) and (
        half := _SURROGATE.search(json.dumps(found, ensure_ascii=False))
    ):
        raise FormatError(_half(half[0]))
    return found


def decoded(content: bytes) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Raises:
        FormatError: the bytes are not UTF-8.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FormatError("the encoding is UTF-16, and only UTF-8 is read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"the key {twice[:40]!r} appears twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise FormatError(_TOO_DEEP)


def _half(character: str) -> str:
    return f"half of a surrogate pair, \\u{ord(character):x}"


def _reason(error: yaml.YAMLError) -> str:
    """The problem of a YAML document and its place, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the limits of this module.

    PyYAML first builds a tree of nodes, in which an alias is the node that it refers to, and then
    the values. The limits are checked on the tree, before aliases are expanded.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # values and depth of a node, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _problem(_TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            self._sizes[id(node)] = self._measured(node)
        elif id(node) not in self._sizes:
            raise _problem("an alias refers to a value that contains it", mark)
        values, depth = self._sizes[id(node)]
        if self._depth + depth > MOST_DEPTH:
            raise _problem(_TOO_DEEP, mark)
        if values > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES:,} values after aliases are expanded", mark)
        return node

    def _measured(self, node: Any) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        pairs = isinstance(node, yaml.MappingNode)
        inner = [n for pair in node.value for n in pair] if pairs else node.value
        sizes = [self._sizes[id(n)] for n in inner]
        return 1 + sum(n for n, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:
            if key.tag.removeprefix(_TAG) not in _KEYS or not isinstance(key, yaml.ScalarNode):
                raise _problem(f"a key is not text{_quoted(key)}", key.start_mark)
            name = key.value if key.tag != f"{_TAG}int" else self.construct_object(key)
            if name in found and not self.twice:
                raise _problem(f"the key {key.value[:40]!r} appears twice", key.start_mark)
            found.add(name)
        return node

    twice = False
    """Whether a key may appear twice."""

    def text(self, node: Any) -> str:
        found = str(self.construct_scalar(node))
        if half := _SURROGATE.search(found):
            raise _problem(_half(half[0]), node.start_mark)
        return found

    def whole(self, node: Any) -> int:
        found = self.construct_yaml_int(node)
        if found.bit_length() > MOST_BITS:
            raise _problem(f"a number of more than {MOST_BITS} bits", node.start_mark)
        return found


class _TaskLoader(_Loader):
    """Reads `!function utils.score` as the text utils.score."""

    twice = True


def _quoted(key: Any) -> str:
    return f": quote {key.value[:40]!r}" if isinstance(key, yaml.ScalarNode) else ""


def _problem(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def _guarded(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A constructor whose errors, such as the ValueError of `!!int x`, have a place in the file."""

    def constructed(loader: Any, node: Any) -> Any:
        try:
            return construct(loader, node)
        except yaml.YAMLError:
            raise
        except Exception as error:
            kind = node.tag.removeprefix(_TAG)
            raise _problem(f"not a value of type {kind[:40]!r}", node.start_mark) from error

    return constructed


def _refuse(loader: Any, node: Any) -> Any:
    raise _problem(
        f"the tag {node.tag.removeprefix(_TAG)[:80]!r} is not supported", node.start_mark
    )


_Loader.yaml_constructors = {
    **{
        _TAG + kind: _guarded(construct)
        for kind, construct in {
            "null": yaml.SafeLoader.construct_yaml_null,
            "bool": yaml.SafeLoader.construct_yaml_bool,
            "int": _Loader.whole,
            "float": yaml.SafeLoader.construct_yaml_float,
            "str": _Loader.text,
            "timestamp": _Loader.text,
            "value": _Loader.text,
        }.items()
    },
    _TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
    _TAG + "map": yaml.SafeLoader.construct_yaml_map,
    None: _refuse,
}
_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: loader.construct_scalar(node))
