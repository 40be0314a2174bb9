"""Scene records as one record for each question, in a file for each kind of question.

python -m scripts.scenes_questions data/scenes/train.parquet data/scenes_questions --count 6000

    data/scenes_questions/existence.parquet    count.parquet, relation.parquet, ..., caption.parquet
    data/scenes_questions/short.parquet        all of them but captions

Records are in the order of the images, and also have the question's `kind` and its `answer`.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.data.scenes import questions
from mmkd.data.scenes.build import RECORDS, conversation
from mmkd.runtime.files import writing
from mmkd.runtime.progress import console

WORDINGS = {
    "existence": questions.EXISTENCE_WORDINGS,
    "relation": questions.RELATION_WORDINGS,
    "count": questions.COUNT_WORDINGS,
    "colour": questions.COLOUR_WORDINGS,
    "name": questions.NAME_WORDINGS,
    "category": questions.CATEGORY_WORDINGS,
    "choice": [f"{wording} {{options}}" for wording in questions.CHOICE_WORDINGS],
    "ocr": questions.OCR_WORDINGS,
    "caption": questions.CAPTION_WORDINGS,
}
WORDS = {"a": "an?", "x": "[a-z]+", "y": "[a-z]+", "relation": "|".join(questions.RELATIONS)}
SHORT = "short"
SCHEMA = pa.schema(
    [RECORDS.field(name) for name in ("id", "image", "conversations", "objects")]
    + [pa.field(name, pa.string()) for name in ("kind", "answer")]
)


def kind_of(question: str) -> str:
    """The kind of a scene question, by its wording.

    Raises:
        ValueError: it has the wording of none or of several kinds.
    """
    kinds = (k for k, patterns in PATTERNS.items() if any(p.fullmatch(question) for p in patterns))
    (kind,) = kinds
    return kind


def _pattern(wording: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", wording)
    texts = [re.escape(part) if i % 2 == 0 else f"(?:{WORDS.get(part, '.+')})"
             for i, part in enumerate(parts)]  # fmt: skip
    return re.compile("".join(texts))


PATTERNS = {kind: [_pattern(w) for w in wordings] for kind, wordings in WORDINGS.items()}


def questions_of(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record for each question of a scene record."""
    turns = record["conversations"]
    for number, (asked, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        question = asked["value"].removeprefix("<image>\n")
        yield {
            "id": f"{record['id']}-{number}",
            "image": record["image"],
            "conversations": conversation([(question, answer["value"])]),
            "objects": record["objects"],
            "kind": kind_of(question),
            "answer": answer["value"],
        }


def write_questions(train: Path, folder: Path, count: int | None = None) -> dict[str, int]:
    """Write the questions about the first images.

    Args:
        train: file of scene records.
        folder: of the files.
        count: number of images; None for all.

    Returns:
        The number of records by file.
    """
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*WORDINGS, SHORT)}
    for record in pq.read_table(train).slice(0, count).to_pylist():
        for question in questions_of(record):
            rows[question["kind"]].append(question)
            if question["kind"] != "caption":
                rows[SHORT].append(question)
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        _write(folder / f"{name}.parquet", own)
    return {name: len(own) for name, own in rows.items()}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with writing(path) as partial:
        table = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, partial, row_group_size=500, compression="zstd")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int)
    given = parser.parse_args()
    for name, written in write_questions(given.train, given.folder, given.count).items():
        console.print(f"{written:,} records in {given.folder / name}.parquet")
