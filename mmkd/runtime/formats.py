"""YAML and JSON as mmkd reads them: plain values, each key once, of a size that ends.

All YAML of the package comes through `parse_yaml`, and all JSON that others write through
`parse_json`. Both raise `FormatError`, whose text is one line, and nothing else:

- YAML gives mappings, lists, texts, numbers, booleans and null. A date is a text. Other tags are
  refused, those that would build an object among them.
- A key that stands twice in one mapping is refused. The libraries keep the last one.
- Depth is bounded, and so is what aliases expand to. A kilobyte of YAML can describe a billion
  values.
"""

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

import yaml

MOST_BYTES = 2**22
"""Of a YAML file. Reading a megabyte takes seconds."""
MOST_DEPTH = 100
"""Mappings and lists inside each other."""
MOST_VALUES = 200_000
"""Values of a YAML file, where each alias counts as all that it stands for."""
_TOO_DEEP = f"more than {MOST_DEPTH} mappings or lists inside each other"
MOST_BITS = 64
"""Of a whole number in YAML, so that other libraries can take it."""
_TAG = "tag:yaml.org,2002:"
_KEYS = ("str", "int", "merge", "timestamp", "value")
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


class FormatError(ValueError):
    """A text is no YAML or JSON that mmkd reads; what it says fits on one line."""


def parse_yaml(text: str | bytes, *, task: bool = False) -> Any:
    """The value of a YAML document; None where it is empty.

    Args:
        text: bytes are UTF-8, with a byte order mark or without.
        task: read an lmms-eval task file: `!function utils.score` is the text utils.score, and of a
            key that stands twice the last one counts, as in lmms-eval.

    Raises:
        FormatError: what is wrong, with line and column.
    """
    if len(text) > MOST_BYTES:
        raise FormatError(f"longer than {MOST_BYTES // 2**20} MiB")
    text = decoded(text) if isinstance(text, bytes) else text
    try:
        return (_TaskLoader if task else _Loader)(text).get_single_data()
    except yaml.YAMLError as error:
        raise FormatError(_reason(error)) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. NaN and Infinity are numbers, as Python writes them.

    Raises:
        FormatError: what is wrong, with line and column where they are known.
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
    """UTF-8 as text, without its byte order mark.

    Raises:
        FormatError: it is another encoding.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FormatError("UTF-16, only UTF-8 is read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"no UTF-8 at byte {error.start}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"the key {twice[:40]!r} stands twice")
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
    return f"half of a character, \\u{ord(character):x}"


def _reason(error: yaml.YAMLError) -> str:
    """What a YAML reader stumbled over, and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses what the module says.

    PyYAML builds a tree of nodes first, in which an alias is the node that it names, and then the
    values. The tree is checked before anything is expanded.
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
            raise _problem("an alias inside of what it stands for", mark)
        values, depth = self._sizes[id(node)]
        if self._depth + depth > MOST_DEPTH:
            raise _problem(_TOO_DEEP, mark)
        if values > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES:,} values, with what aliases stand for", mark)
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
                raise _problem(f"a key that is no text{_quoted(key)}", key.start_mark)
            name = key.value if key.tag != f"{_TAG}int" else self.construct_object(key)
            if name in found and not self.twice:
                raise _problem(f"the key {key.value[:40]!r} stands twice", key.start_mark)
            found.add(name)
        return node

    twice = False
    """Whether a key may stand twice."""

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
    """A constructor whose own mistakes (`!!int x` is a ValueError) have their place in the file."""

    def constructed(loader: Any, node: Any) -> Any:
        try:
            return construct(loader, node)
        except yaml.YAMLError:
            raise
        except Exception as error:
            kind = node.tag.removeprefix(_TAG)
            raise _problem(f"no value of the kind {kind[:40]!r}", node.start_mark) from error

    return constructed


def _refuse(loader: Any, node: Any) -> Any:
    raise _problem(f"the tag {node.tag.removeprefix(_TAG)[:80]!r} is not read", node.start_mark)


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
