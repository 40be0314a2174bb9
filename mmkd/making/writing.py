"""Write chosen answers as records: JSON lines with paths of images, or parquet with the images."""

import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmkd.data.images import image_content
from mmkd.data.records import located
from mmkd.errors import DataError
from mmkd.making.choose import Answered, Judged
from mmkd.making.questions import Question, about_images
from mmkd.recipe import MakeConfig
from mmkd.runtime.files import writing

Row = dict[str, Any]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GROUP = 1_000
"""Records of a parquet file that are in memory at once, with their images."""
OWN_ANSWER = 200
"""Most characters that are kept of a record's own answer."""


class RecordWriter:
    """Makes rows of questions and their chosen answers.

    Args:
        config: the entry.
        revisions: of the models, by name.
    """

    def __init__(self, config: MakeConfig, revisions: dict[str, str]):
        self.config, self.revisions = config, revisions
        scorers = [check.kind for check in config.checks if check.scores]
        self.scorer = scorers[0] if scorers else None

    def rows(self, answered: Answered) -> list[Row]:
        """The rows of a question: none, one or several."""
        keep = self.config.keep
        if keep == "pair":
            assert self.scorer is not None
            pair = answered.pair(self.scorer)
            return [] if pair is None else [self._pair(answered, *pair)]
        if keep == "best":
            best = answered.best(self.scorer)
            return [] if best is None else [self._record(answered, best)]
        return [self._record(answered, answer) for answer in answered.passed]

    def _record(self, answered: Answered, answer: Judged) -> Row:
        several = self.config.keep == "all" and self.config.sampling.n > 1
        asked = answered.question.messages
        row = {
            "id": answered.question.id + (f"-{answer.number}" if several else ""),
            "images": answered.index,
            "messages": [*asked, _said(answer)],
            "made": self._made(answered, answer),
        }
        if self.config.writes == "questions":
            images = sum(part["type"] == "image" for m in asked for part in m["content"])
            return row | {"messages": about_images(images, answer.candidate.text)}
        return row if answer.candidate.finished else row | {"unfinished": True}

    def _pair(self, answered: Answered, best: Judged, worst: Judged) -> Row:
        assert self.scorer is not None
        made = self._made(answered, best)
        made["rejected"] = {
            "by": worst.candidate.maker,
            "candidate": worst.number,
            "score": [*worst.scores[self.scorer]],
        }
        return {
            "id": f"{answered.question.id}-pair",
            "images": answered.index,
            "prompt": answered.question.messages,
            "chosen": [_said(best)],
            "rejected": [_said(worst)],
            "made": made,
        }

    def _made(self, answered: Answered, answer: Judged) -> Row:
        """Where an answer comes from."""
        maker = answer.candidate.maker
        made: Row = {
            "by": maker,
            "revision": self.revisions[maker],
            "sampling": self.config.sampling.model_dump(mode="json"),
            "seed": self.config.seed,
            "candidate": answer.number,
            "passed": len(answered.passed),
            "pass_rate": len(answered.passed) / self.config.sampling.n,
            "mmkd": version("mmkd"),
        }
        if self.config.finds_hard:
            own = answered.question.reference or ""
            made["own_answer"] = own if len(own) <= OWN_ANSWER else f"{own[:OWN_ANSWER]}..."
        if self.scorer is not None:
            made["score"] = [*answer.scores[self.scorer]]
        return made


def join_rows(found: Sequence[tuple[Question, Row]], seed: int) -> list[Row]:
    """One record for each image, whose turns are the records about it, in random order. A record's
    own question comes first if it has a system message or earlier turns.

    Args:
        found: a question, with its record.
        seed: of the order.
    """
    groups: dict[str, tuple[str, list[Row]]] = {}
    for question, row in found:
        groups.setdefault(question.group, (question.about, []))[1].append(row)
    joined = []
    for about, rows in groups.values():
        words = f"{seed} {about}".encode()
        random.Random(hashlib.blake2b(words, digest_size=8).digest()).shuffle(rows)
        rows.sort(key=lambda row: len(row["messages"]) == 2)
        first, *later = rows
        messages = [*first["messages"], *(_without_images(m) for r in later for m in r["messages"])]
        made = {**first["made"], "turns": [{"id": r["id"], **_own(r["made"])} for r in rows]}
        joined.append({"id": about, "images": first["images"], "messages": messages, "made": made})
    return joined


def _without_images(message: Row) -> Row:
    content = [part for part in message["content"] if part["type"] != "image"]
    return {**message, "content": content}


def _own(made: Row) -> Row:
    """What differs between the answers of a joined record."""
    return {key: made[key] for key in ("by", "candidate", "pass_rate", "score") if key in made}


def write_records(
    out: Path, rows: Sequence[Row], references: Callable[[int], list[tuple[Any, Path | None]]]
) -> None:
    """Write records in one step.

    Args:
        out: file, .jsonl or .parquet.
        rows: with the index of a question in place of images.
        references: the images of a question. They are read while the file is written, because
            those of all records may not fit into memory.

    Raises:
        DataError: there are none.
    """
    if not rows:
        raise DataError("there are no records", where=str(out), hint="change the checks")
    with writing(out) as partial:
        if out.suffix == ".parquet":
            _write_parquet(partial, rows, references)
            return
        with open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                with located(lambda: str(out)):
                    paths = [_path(reference) for reference, _ in references(row["images"])]
                file.write(json.dumps(row | {"images": paths}) + "\n")


def _write_parquet(
    out: Path, rows: Sequence[Row], references: Callable[[int], list[tuple[Any, Path | None]]]
) -> None:
    # pyarrow takes the columns of the first row.
    names = list(dict.fromkeys(name for row in rows for name in row))
    whole = [dict.fromkeys(names) | row | {"images": []} for row in rows]
    found = pa.Table.from_pylist(whole).schema
    schema = found.set(found.get_field_index("images"), pa.field("images", pa.list_(IMAGE)))
    with pq.ParquetWriter(out, schema, compression="zstd") as file:
        for first in range(0, len(rows), GROUP):
            part = []
            for row in rows[first : first + GROUP]:
                images = references(row["images"])
                content = [{"bytes": _bytes(*image), "path": None} for image in images]
                part.append(dict.fromkeys(names) | row | {"images": content})
            file.write_table(pa.Table.from_pylist(part, schema))


def check_out(config: MakeConfig, question: Question, where: str) -> None:
    """Check that the file can hold the images.

    Raises:
        DataError: the images are no files, and the file would hold paths; or the paths would be
            relative to another folder.
    """
    if config.out.endswith(".parquet"):
        return
    for reference, root in question.references:
        try:
            _path(reference)
        except DataError as error:
            raise error.at(f"{where}.out") from error
        own = Path(config.out).parent.resolve()
        named = config.pictures is not None or config.images is not None
        if not named and root is not None and root.resolve() != own:
            raise DataError(
                f"image paths are relative to {root}, and in the new file to {own}",
                where=f"{where}.images",
                hint=f"set it to {root}",
            )


def _path(reference: Any) -> str:
    """The path of an image.

    Raises:
        DataError: it is no file.
    """
    path = reference
    if isinstance(reference, dict) and not isinstance(reference.get("bytes"), bytes):
        path = reference.get("path")
    if not isinstance(path, str):
        raise DataError(
            "the records contain their images, and a .jsonl file holds paths",
            hint="end its name with .parquet",
        )
    return path


def _said(answer: Judged) -> Row:
    content = [{"type": "text", "text": answer.candidate.text}]
    return {"role": "assistant", "content": content}


def _bytes(reference: Any, root: Path | None) -> bytes:
    """The file of an image; of a decoded one, a PNG."""
    content = image_content(reference, root)
    if content is not None:
        return content
    assert isinstance(reference, Image.Image)
    out = io.BytesIO()
    reference.save(out, "PNG")
    return out.getvalue()
