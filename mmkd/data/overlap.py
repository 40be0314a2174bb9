"""Compare questions: equality up to spelling, and runs of words that two texts share."""

import re
import unicodedata
from hashlib import blake2b

import numpy as np

WORDS = 13
"""Number of consecutive words that two texts must share, as in GPT-3 (arXiv 2005.14165, app. C)."""
WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation. Text that is written without
    spaces is one word."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def question_keys(text: str) -> set[int]:
    """64-bit keys of a question: of its words, and of the words of its first line.

    Two questions are equal if they have a key in common. Benchmarks often add a line such as
    "Answer the question using a single word or phrase." to the question of the data set.
    """
    lines = (words_of(line) for line in text.splitlines())
    first: list[str] = next(filter(None, lines), [])
    return {_key(" ".join(words)) for words in (first, words_of(text)) if words}


def run_keys(text: str) -> np.ndarray:
    """64-bit keys of all runs of `WORDS` consecutive words, [n] uint64, ascending and different."""
    words = words_of(text)
    runs = (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
    return np.unique(np.fromiter(map(_key, runs), dtype=np.uint64))


def _key(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())
