"""Leave out texts that are too similar to an earlier one.

Lion (Jiang et al. 2023, arXiv 2305.12870) keeps a new instruction if its ROUGE-L F1 with each other
one is at most 0.7. With words in place of characters this is the normalized similarity of the Indel
distance: with m and n words and a longest common subsequence of l, both are 2 l / (m + n).
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mmkd.errors import RecipeError
from mmkd.making.checks.words import words_of
from mmkd.making.choose import Answered
from mmkd.making.questions import Question
from mmkd.making.requests import image_digest
from mmkd.making.writing import Row
from mmkd.recipe import MakeConfig

_ROUNDING = 1e-9


class DistinctTexts:
    """Texts of which no two are too similar.

    Args:
        most: largest ROUGE-L F1 of two texts.
    """

    def __init__(self, most: float):
        self.most = most
        self._words: list[list[str]] = []

    def add(self, text: str) -> bool:
        """Add a text unless it is too similar to one that is here; returns whether it was added."""
        process, distance = _import_rapidfuzz()
        words = words_of(text)
        # The division of integers decides: it is exact where the F1 score equals `most`.
        found = process.extractOne(
            words,
            self._words,
            scorer=distance.Indel.normalized_similarity,
            score_cutoff=max(self.most - _ROUNDING, 0),
        )
        if found is not None and rouge_l(words, found[0]) > self.most:
            return False
        self._words.append(words)
        return True


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L F1 score of two lists of words, in [0, 1]; 1 if both are empty."""
    _, distance = _import_rapidfuzz()
    total = len(one) + len(other)
    return 2 * distance.LCSseq.similarity(one, other) / total if total else 1.0


def check_distinct(config: MakeConfig, where: str) -> None:
    """Check that texts can be compared, if an entry wants it.

    Raises:
        RecipeError: a package is not installed.
    """
    if config.distinct is not None:
        try:
            _import_rapidfuzz()
        except ImportError as error:
            raise RecipeError(
                "texts are compared by the package RapidFuzz",
                where=f"{where}.distinct",
                hint="pip install 'mmkd[data]', or leave it out",
            ) from error


def topic_of(question: Question, config: MakeConfig) -> str:
    """A hash of what texts have in common that are compared: the images and, for answers, the
    question.

    Args:
        question: with references to its images.
        config: the entry.
    """
    seen = hashlib.blake2b(digest_size=16)
    for reference in question.references:
        seen.update(image_digest(*reference))
    if config.writes == "answers":
        seen.update(json.dumps(question.messages, sort_keys=True).encode())
    return seen.hexdigest()


def without_similar(
    config: MakeConfig,
    answered: Sequence[Answered],
    topics: Sequence[str],
    found: Sequence[list[Row]],
) -> list[list[Row]]:
    """The rows whose texts are not too similar to an earlier one of the same topic. New questions
    are also compared with those of the records from which they are made.

    Args:
        config: the entry, with `distinct`.
        answered: the questions.
        topics: `topic_of` each question.
        found: rows of each question.
    """
    assert config.distinct is not None
    texts = {topic: DistinctTexts(config.distinct) for topic in topics}
    if config.writes == "questions":
        for topic, one in zip(topics, answered, strict=True):
            if one.question.own is not None:
                texts[topic].add(one.question.own)
    return [
        [row for row in rows if texts[topic].add(row["messages"][-1]["content"][-1]["text"])]
        for topic, rows in zip(topics, found, strict=True)
    ]


def _import_rapidfuzz() -> tuple[Any, Any]:
    from rapidfuzz import distance, process

    return process, distance
