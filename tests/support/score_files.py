"""Small files of scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.data.records import Source
from mmkd.data.samples import key_of
from mmkd.data.score_file import write_scores
from mmkd.recipe import SourceConfig


def put_scores(
    path: Path, train: Path, tokenizers: Sequence[str] = ("t", "t"), **models: dict[str, Any]
) -> str:
    """Write scores of records without images; returns the path.

    Args:
        path: the file.
        train: file of records.
        tokenizers: of the models.
        models: numbers by model, such as `{"nll": [...]}`; all others are 1.
    """
    source = Source(SourceConfig(train=str(train)))
    label, count = source.config.label, len(source)
    records = [(source.id(i), label, i, key_of(source[i], []).hex()) for i in range(count)]
    names = ("tokens", "characters", "nll", "margin", "entropy")
    scores = {
        model: {n: np.array(given.get(n, np.ones(count)), np.float64) for n in names}
        for model, given in models.items()
    }
    facts = {
        "sources": {label: {"records": count}},
        "models": {
            model: {"model": model, "tokenizer": tokenizer}
            for model, tokenizer in zip(models, tokenizers, strict=False)
        },
    }
    write_scores(path, records, scores, facts)
    return str(path)
