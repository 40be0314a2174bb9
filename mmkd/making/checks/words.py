"""Compare answers by their words."""

import re
from collections import Counter

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def word_f1(one: str, other: str) -> float:
    """F1 score of two texts' words, each counted as often as it occurs, in [0, 1]. It is 1 for
    texts with the same words, two texts without words included."""
    first, second = Counter(words_of(one)), Counter(words_of(other))
    if not first and not second:
        return 1.0
    shared = (first & second).total()
    return 2 * shared / (first.total() + second.total())
