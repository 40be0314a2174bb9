"""What a machine must not tell: where its files lie, and tokens."""

import re
from pathlib import PureWindowsPath
from typing import Any

from mmkd.redact import redact

_START = r"(?:file:/+|~[\w.-]*[\\/]|\.\.[\\/]|/(?![/\s]|$)|[A-Za-z]:[\\/]|\\\\)"
_WHOLE = re.compile(_START)
_QUOTED = re.compile(rf"(?<=')({_START}[^']*)(?=')|(?<=\")({_START}[^\"]*)(?=\")")
_WITHIN = re.compile(rf"(?<![\w:/.~\\-]){_START}[^\s'\",;=\[\]{{}}()]*")


def scrub(value: Any) -> Any:
    """A recipe's or provenance's content with the last name of every path outside of the working
    directory in the path's place, and without secrets; keys too."""
    if isinstance(value, dict):
        scrubbed: dict[str, Any] = {}
        for key, item in value.items():
            scrubbed[_unused(_text(str(key)), scrubbed)] = scrub(item)
        return scrubbed
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def file_name(path: str) -> str:
    """The last name of a path of any system."""
    return PureWindowsPath(path).name


def _text(text: str) -> str:
    text = redact(text)
    key, equals, value = text.rpartition("=")
    if _WHOLE.match(value):  # whole, as a path may have spaces
        return key + equals + file_name(value)
    text = _QUOTED.sub(lambda found: file_name(found[0]), text)  # may have spaces, too
    return _WITHIN.sub(lambda found: file_name(found[0]), text)


def _unused(name: str, taken: dict[str, Any]) -> str:
    """The name, numbered where two paths end alike."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free
