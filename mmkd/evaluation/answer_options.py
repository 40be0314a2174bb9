"""The true answer to a task's question and its options, from its document."""

import ast
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmkd.data.scenes.questions import LETTERS

LISTS = ("choices", "options")
"""Columns with a list of options, which letters stand for."""
COLUMNS = (("A", "B", "C", "D", "E", "F"), ("choice_a", "choice_b", "choice_c", "choice_d"))
"""Columns with one option each."""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def truth_of(document: Mapping[str, Any], target: Any, template: Any) -> str:
    """The true answer of a document as text; "" if there is none. If several people have answered,
    it is the most frequent answer.

    Args:
        document: of a task.
        target: as lmms-eval has made it.
        template: `doc_to_target` of the task. Where it names a column that does not exist,
            lmms-eval takes the name itself for the answer.
    """
    given = document.get("answers")
    people = given if isinstance(given, list) else []
    said = [a.get("answer") if isinstance(a, Mapping) else a for a in people]
    texts = [text.strip() for text in said if isinstance(text, str) and text.strip()]
    if texts:
        return Counter(texts).most_common(1)[0][0]
    if not isinstance(target, str) or (target == template and target not in document.values()):
        return ""
    return target.strip()


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
        if (listed := _listed(document.get(name))) is not None:
            return len(listed)
    for names in COLUMNS:
        if all(name in document for name in names[:2]):
            return sum(_is_given(document.get(name)) for name in names)
    return 0


def _listed(value: Any) -> list[Any] | None:
    """A list, also if it is written as text, as in MMMU; None for other values."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _is_given(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", "nan")
