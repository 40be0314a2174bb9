"""Records in LLaVA's schema, written to a folder."""

import json

from mmkd.data.records import Records
from mmkd.recipe import DataConfig

TURNS = [
    ("human", "<image>\nHow many cats?"),
    ("gpt", "two cats and a dog"),
    ("human", "And the dog's hat?"),
    ("gpt", "No hat: none at all."),
]


def conversations(turns):
    return [{"from": who, "value": what} for who, what in turns]


def records(folder, rows, suffix=".json"):
    """The rows as a file, opened."""
    path = folder / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(r) for r in rows))
    return Records(DataConfig(train=str(path)))
