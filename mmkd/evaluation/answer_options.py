"""The options of a task's question, from its document."""

from collections.abc import Mapping
from typing import Any

from mmkd.data.scenes.questions import LETTERS

LISTS = ("choices", "options")
"""Columns with a list of options, which letters stand for."""
COLUMNS = (("A", "B", "C", "D", "E", "F"), ("choice_a", "choice_b", "choice_c", "choice_d"))
"""Columns with one option each."""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def options_of(document: Mapping[str, Any], truth: str) -> tuple[str, ...]:
    """The answers that a question allows, the true one included; () if they are not known.

    They are known for questions that are answered with yes or no, and with the letter of an option
    if the document says how many options there are. Upper and lower case are those of the true
    answer.

    Args:
        document: of a task.
        truth: its true answer.
    """
    both = [tuple(f(word) for word in ("yes", "no")) for f in (str.lower, str.title, str.upper)]
    for options in both:
        if truth in options:
            return options
    letters = tuple(ALPHABET[: _count(document)])
    for options in (letters, tuple(letter.lower() for letter in letters)):
        if truth in options:
            return options
    return ()


def _count(document: Mapping[str, Any]) -> int:
    """Number of options that letters stand for; 0 if it is not known."""
    if document.get("kind") == "choice":  # of the scene tasks, which list them in the question
        return len(LETTERS)
    for name in LISTS:
        if isinstance(document.get(name), list):
            return len(document[name])
    for names in COLUMNS:
        if all(name in document for name in names[:2]):
            return sum(_is_given(document.get(name)) for name in names)
    return 0


def _is_given(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", "nan")
