"""The JSON files of a run's folder, and the keys that each must have.

A file that was cut, emptied or written by another program is refused when it is read. Keys that are
not listed here are kept.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmkd.errors import CheckpointError
from mmkd.runtime.files import read_json

Count = Annotated[int, Field(ge=0, strict=True)]
Texts = dict[str, str]


class Shape(BaseModel):
    """A JSON object with these keys."""

    model_config = ConfigDict(extra="allow")


class Done(Shape):
    """done.json of a finished stage."""

    steps: Count
    metrics: dict[str, Any] = {}
    validation: dict[str, Any] | None = None


class Started(Shape):
    """done.json of a converted student that a stage starts from."""

    before: Count
    after: Count
    changes: list[str]


class Counts(Shape):
    """counts.json of an entry of `make`."""

    questions: Count
    kept: Count
    records: Count
    answers: Count
    refused: dict[str, Count]
    hard: dict[str, tuple[Count, Count]] = {}


class StageCounts(Shape):
    """made.json of a stage: the counts of each entry of `make` that it reads, by name."""

    entries: dict[str, Counts]


class FileFacts(Shape):
    bytes: Count
    sha256: str


class State(Shape):
    """state.json of a checkpoint."""

    step: Count
    records_per_step: Count
    files: Annotated[dict[str, FileFacts], Field(min_length=1)]
    mixture: dict[str, Any] | None = None


class Shard(FileFacts):
    """rows-RANK-NUMBER.json of a teacher's cache."""

    file: str
    records: Count
    rows: Count


class Hidden(Shape):
    regions: list[str]
    width: Count


class Manifest(Shape):
    """manifest.json of a teacher's cache."""

    format: Count
    vocabulary: Count
    k: Count
    regions: list[str]
    max_length: Count
    processor: str
    teacher: dict[str, Any]
    hidden: Hidden | None
    shards: list[Shard]


class Bin(Shape):
    count: Count
    confidence: float
    accuracy: float


class Reliability(Shape):
    """Predictions of one kind, in bins by their confidence."""

    count: Count
    ece: float
    bins: Annotated[list[Bin], Field(min_length=1)]


class Calibrated(Shape):
    """The calibration of one task."""

    tokens: Reliability | None = None
    answers: Reliability | None = None


class Results(Shape):
    """results.json of an evaluation."""

    scores: dict[str, dict[str, float]]
    data: dict[str, list[str]] = {}
    failed: Texts = {}
    unanswered: dict[str, dict[str, Any]] = {}
    calibration: dict[str, Calibrated] = {}
    limit: Count | None = None
    batch_size: Count | None = None
    seconds: float | None = None
    parameters: float | None = None
    weights_bytes: float | None = None
    tokens_per_second: float | None = None


class DecodeRow(Shape):
    context: Count
    milliseconds: float
    cache_bytes: float


class Decoding(Shape):
    """decode.json of an evaluation."""

    request: dict[str, Any] = {}
    rows: list[DecodeRow]


class Answer(Shape):
    question: str
    truth: str
    answer: str
    picture: str | None


class Answers(Shape):
    """answers.json of an evaluation."""

    request: dict[str, Any] = {}
    expected: Count
    answers: list[Answer]


class Task(Shape):
    """The results of a finished task in an unfinished evaluation."""

    scores: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]
    unanswered: dict[str, dict[str, Any]]
    calibration: dict[str, Calibrated] = {}
    tokens: float
    generation_seconds: float
    seconds: float


class Kept(Shape):
    facts: Any
    given: Task


class Answered(Shape):
    """A line of an evaluation's samples/TASK.jsonl."""

    doc_id: Count
    question: Any
    answer: Any


class WrittenSource(Shape):
    train: str | None = None


class WrittenData(WrittenSource):
    sources: list[WrittenSource] | None = None


class WrittenValidation(Shape):
    metric: str | None = None
    patience: Count | None = None


class WrittenStage(Shape):
    name: str
    objectives: list[dict[str, Any]] = []
    data: WrittenData | None = None
    validation: WrittenValidation | None = None


class WrittenTeacher(Shape):
    model: str | None = None
    source: str | None = None


class WrittenSamples(Shape):
    records: str | None = None


class WrittenEvaluation(Shape):
    include: str | None = None
    tasks: list[str] | None = None
    samples: WrittenSamples | None = None


class Written(Shape):
    """recipe.yaml and training.yaml of a run."""

    name: str
    label: str = "student"
    seed: Count = 0
    seeds: list[Count] = []
    stages: list[WrittenStage]
    variants: dict[str, Any] = {}
    data: WrittenData | None = None
    student: dict[str, Any] = {}
    teacher: WrittenTeacher | None = None
    more_teachers: list[WrittenTeacher] = []
    evaluate: WrittenEvaluation | None = None
    release: dict[str, Any] | None = None


class Provenance(Shape):
    """provenance.json of a run."""

    command: list[Any] = []
    seeds: list[Any] = []
    versions: dict[str, Any] = {}
    git: dict[str, Any] | None = None
    machine: dict[str, Any] = {}
    models: dict[str, Any] = {}
    plugins: dict[str, Any] = {}
    data: dict[str, Any] = {}
    replaced: list[dict[str, Any]] = []
    continued: list[dict[str, Any]] = []


def read_as(shape: type[Shape], path: Path, hint: str) -> dict[str, Any]:
    """The content of a JSON file.

    Args:
        shape: the keys that it must have.
        path: the file.
        hint: the hint of the error.

    Raises:
        CheckpointError: the file cannot be read, or has the wrong structure.
    """
    try:
        found = read_json(path)
        shape.model_validate(found)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"it is damaged ({_reason(error)})", where=str(path), hint=hint
        ) from error
    return dict(found)


def read_if(shape: type[Shape], path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None where `read_as` would raise."""
    try:
        return read_as(shape, path, "")
    except CheckpointError:
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        if first["type"] == "value_error":
            return first["msg"].removeprefix("Value error, ")
        key = ".".join(map(str, first["loc"]))
        return f"{key}: {first['msg'].lower()}" if key else "not a JSON object"
    return " ".join(str(error).split())[:200]
