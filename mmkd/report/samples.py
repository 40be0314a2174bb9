"""Images with questions, ground truth and the models' answers, chosen deterministically."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmkd.data.images import load_image, thumbnail
from mmkd.data.sources.files import find_files
from mmkd.errors import DataError
from mmkd.evaluation.task_files import data_files, read_task
from mmkd.report.rundata import Run, read_samples
from mmkd.runtime.run_folder import TEACHER

PER_TASK = 9
PER_WORDY_TASK = 6  # documents of a task whose answers are sentences
WORDY = 30  # characters from which on an answer is a sentence
Sample = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One model's answer; `correct` is None if the task does not judge single answers."""

    label: str
    text: str
    correct: bool | None
    invented: list[str]


@dataclass(frozen=True)
class Shown:
    """One document on the page."""

    picture: str | None
    kind: str
    question: str
    truth: str
    answers: list[Answer]


@dataclass(frozen=True)
class TaskSamples:
    """The chosen documents of one task, and how often the models disagree."""

    task: str
    wordy: bool
    shown: list[Shown]
    disagreements: int
    documents: int


def sample_labels(run: Run) -> dict[str, str]:
    """{row label: evaluation label} of the teacher and of each student's first seed."""
    chosen = {TEACHER: TEACHER} if run.teacher else {}
    for member in run.members:
        if member.label in run.results:
            chosen.setdefault(member.group, member.label)
    return chosen


def choose_samples(run: Run) -> list[TaskSamples]:
    """Choose documents of each task that all models have answered; half of them are documents on
    which the models disagree."""
    labels = sample_labels(run)
    tasks = dict.fromkeys(
        task for label in labels.values() for task in run.results[label].get("scores", {})
    )
    return [found for task in tasks if (found := _task_samples(run, task, labels))]


def _task_samples(run: Run, task: str, labels: dict[str, str]) -> TaskSamples | None:
    answers = {name: read_samples(run, label, task) for name, label in labels.items()}
    joined = join({name: rows for name, rows in answers.items() if rows})
    if not joined:
        return None
    differing = [doc for doc in joined if disagree(joined[doc])]
    wordy = any(len(str(s["answer"])) > WORDY for doc in joined.values() for s in doc.values())
    chosen = pick(joined, differing, PER_WORDY_TASK if wordy else PER_TASK)
    pictures = load_pictures(run, task, [joined[doc] for doc in chosen])
    shown = [_shown(joined[doc], pictures.get(doc)) for doc in chosen]
    return TaskSamples(task, wordy, shown, len(differing), len(joined))


def join(answers: dict[str, list[Sample]]) -> dict[int, dict[str, Sample]]:
    """{doc_id: {label: sample}} of the documents that all models have answered under the same
    id."""
    tables = {name: {s["doc_id"]: s for s in rows} for name, rows in answers.items()}
    if not tables:
        return {}
    common = set.intersection(*(set(t) for t in tables.values()))
    found = {doc: {name: t[doc] for name, t in tables.items()} for doc in sorted(common)}
    return {d: s for d, s in found.items() if len({str(v["question"]) for v in s.values()}) == 1}


def disagree(samples: dict[str, Sample]) -> bool:
    """Whether some models are right and others wrong, or, without verdicts, the texts differ."""
    verdicts = {s.get("correct") for s in samples.values()}
    if None in verdicts:
        return len({str(s.get("prediction")).strip() for s in samples.values()}) > 1
    return len(verdicts) > 1


def pick(joined: dict[int, dict[str, Sample]], differing: Iterable[int], count: int) -> list[int]:
    """Half from `differing`, the rest from the others, spread over kinds of questions."""
    hard = set(differing)
    first = _spread(joined, [d for d in joined if d in hard])
    second = _spread(joined, [d for d in joined if d not in hard])
    half = min(len(first), max(-(-count // 2), count - len(second)))
    return first[:half] + second[: count - half]


def _spread(joined: dict[int, dict[str, Sample]], docs: Sequence[int]) -> list[int]:
    """Round-robin over kinds. Within a kind, the order depends on the question only."""
    by_kind: dict[str, list[int]] = {}
    for doc in sorted(docs, key=lambda d: _order(d, joined[d])):
        by_kind.setdefault(_kind(joined[doc]), []).append(doc)
    longest = max((len(v) for v in by_kind.values()), default=0)
    return [by_kind[k][i] for i in range(longest) for k in sorted(by_kind) if i < len(by_kind[k])]


def _order(doc: int, samples: dict[str, Sample]) -> str:
    question = next(iter(samples.values()))["question"]
    return hashlib.sha256(f"{doc} {question}".encode()).hexdigest()


def _kind(samples: dict[str, Sample]) -> str:
    first = next(iter(samples.values()))
    return str(first.get("kind") or first.get("category") or "")


def _shown(samples: dict[str, Sample], picture: str | None) -> Shown:
    first = next(iter(samples.values()))
    answers = [
        Answer(
            label,
            str(s.get("prediction", "")).strip(),
            s.get("correct"),
            sorted({str(name) for name in s.get("hallucinated") or []}),
        )
        for label, s in samples.items()
    ]
    return Shown(picture, _kind(samples), str(first["question"]), str(first["answer"]), answers)


# Answers to a recipe's own questions


def held_out_answers(run: Run) -> TaskSamples | None:
    """The answers of the teacher and of every student's first seed to `evaluate.samples`."""
    chosen = {TEACHER: TEACHER} if TEACHER in run.answers and run.is_teacher(TEACHER) else {}
    for member in run.members:
        if member.label in run.answers:
            chosen.setdefault(member.group, member.label)
    tables = {name: _own_answers(run, label) for name, label in chosen.items()}
    joined = join({name: rows for name, rows in tables.items() if rows})
    if not joined:
        return None
    differing = [doc for doc in joined if disagree(joined[doc])]
    wordy = any(len(s["prediction"]) > WORDY for doc in joined.values() for s in doc.values())
    shown = [_shown(rows, next(iter(rows.values()))["picture"]) for rows in joined.values()]
    return TaskSamples("held-out images", wordy, shown, len(differing), len(joined))


def trained_on(run: Run) -> bool:
    """Whether the records of `evaluate.samples` are data that the recipe trains on."""
    samples = (run.recipe.get("evaluate") or {}).get("samples") or {}
    stages = [s.get("data") for s in run.recipe.get("stages", [])]
    data = [d for d in (run.recipe.get("data"), *stages) if d]
    parts = [part for d in data for part in (d, *(d.get("sources") or []))]
    trained = {file for part in parts if part.get("train") for file in _files(run, part["train"])}
    asked = samples.get("records")
    return asked is not None and not trained.isdisjoint(_files(run, asked))


def _files(run: Run, train: str) -> set[str]:
    """The files of a source, independent of its spelling; its name if they do not exist here."""
    try:
        return {str(path.resolve()) for path in find_files(str(run.find(train)))}
    except DataError:
        return {train}


def _own_answers(run: Run, label: str) -> list[Sample]:
    """The answers in the form of `samples/<task>.jsonl`. If a question could not be asked, the
    prediction is the reason."""
    return [
        {
            "doc_id": number,
            "question": row["question"],
            "answer": row["truth"],
            "prediction": f"(could not be asked: {row['unanswered']})"
            if "unanswered" in row
            else row["answer"],
            "correct": None,
            "picture": row["picture"],
        }
        for number, row in enumerate(run.answers[label].get("answers", []))
    ]


# Images


def load_pictures(run: Run, task: str, documents: Sequence[dict[str, Sample]]) -> dict[int, str]:
    """{doc_id: data URI} from the task's parquet files; empty if they are not on this machine."""
    paths = picture_files(run, task)
    if not paths or not all(path.is_file() for path in paths):
        return {}
    wanted = {}
    for samples in documents:
        first = next(iter(samples.values()))
        wanted[int(first["doc_id"])] = first.get("id")
    try:
        rows = _rows(paths, wanted)
    except (OSError, ValueError, KeyError):  # write the report without these images
        return {}
    shown = {}
    for doc, (row, folder) in rows.items():
        if image := _first_picture(row.get("image")):
            with suppress(DataError):
                shown[doc] = _data_uri(image, folder)
    return shown


def _rows(paths: Sequence[Path], wanted: dict[int, Any]) -> dict[int, tuple[Sample, Path]]:
    """Rows by index, counted over all files, with the folders of their files. Rows whose id differs
    from the sample's are left out."""
    found, start = {}, 0
    for path in paths:
        file = pq.ParquetFile(path)
        columns = [name for name in ("id", "image") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for doc in sorted(wanted):
                if start <= doc < start + batch.num_rows:
                    row = batch.slice(doc - start, 1).to_pylist()[0]
                    if wanted[doc] is None or row.get("id", wanted[doc]) == wanted[doc]:
                        found[doc] = row, path.absolute().parent
            start += batch.num_rows
    return found


def _first_picture(image: Any) -> Any:
    """The image, or the first where a document has several."""
    return (image[0] if image else None) if isinstance(image, list) else image


def _data_uri(image: dict[str, Any], folder: Path) -> str:
    """An image of a document, whose path must not leave the folder of the document's file."""
    return thumbnail(load_image(image, folder))


def picture_files(run: Run, task: str) -> list[Path]:
    """The Parquet files with a task's documents, in order: those that the evaluation read, or those
    that the task file names."""
    for results in run.results.values():
        found = [run.find(name) for name in results.get("data", {}).get(task) or []]
        if found and all(path.is_file() for path in found):
            return found
    include = (run.recipe.get("evaluate") or {}).get("include")
    if not include:
        return []
    folder = run.find(include)
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
        config = read_task(path)
        if config.get("task") == task:
            return data_files(config, path.parent)
    return []
