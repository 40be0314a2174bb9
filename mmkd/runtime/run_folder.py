"""The layout of a run's folder. Everything that writes or reads a run takes its paths from here.

runs/<name>/
  recipe.yaml  provenance.json  report.html
  bench/                        seconds per step that `mmkd bench` has measured
  <member>/                     the assistant; the recipe itself and its variants, once per seed
    training.yaml               what is trained here; another recipe may not continue it
    00-start/student/           from-scratch or converted students only
    01-<stage>/                 metrics.jsonl  validation.jsonl  skipped.jsonl  inputs.json
                                checkpoints/  student/  objectives.safetensors  done.json
      start/student/            what a stage that converts starts from
      made/  made.json          data that were made before this stage; how many questions were kept
    replaced/                   what a recipe that has changed since has replaced
  evaluation/<label>/           results.json  request.json  samples/  answers.json  decode.json
  release/<member>/             what `mmkd release` sends to the Hub
  tensorboard/

A run of one student has no folder for its member: the stages are in the run's folder itself. Its
assistant has one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmkd.runtime.shapes import Done, Shape, Started, read_as

TEACHER = "teacher"
"""Label of the teacher's scores."""
ASSISTANT = "assistant"
"""Label of the assistant, and the name of its folder."""
START, REPLACED = "00-start", "replaced"
RESERVED = ("evaluation", "release", REPLACED, "tensorboard", "wandb", "trackio")
"""Names in a run's folder that no student's folder may have."""
_NUMBERED = re.compile(r"(\d{2,})-")
DAMAGED = "bring it back, or delete it to make again what its folder holds"


def stage_name(index: int, name: str) -> str:
    """The name of a stage's folder; `index` counts from 0."""
    return f"{index + 1:02d}-{name}"


@dataclass(frozen=True)
class StudentFolder:
    """A folder that holds one student, and the file that says that it is complete."""

    path: Path
    shape: ClassVar[type[Shape]] = Started

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def done(self) -> Path:
        return self.path / "done.json"

    @property
    def inputs(self) -> Path:
        """Notes of what the student was made from."""
        return self.path / "inputs.json"

    def is_done(self) -> bool:
        """Whether the student is complete.

        Raises:
            CheckpointError: `done.json` is damaged.
        """
        return self.done.exists() and bool(read_as(self.shape, self.done, DAMAGED))

    def is_begun(self) -> bool:
        """Whether the folder holds work that would be lost or mixed with that of a new recipe."""
        return any(path.exists() for path in (self.done, self.student))


@dataclass(frozen=True)
class StageFolder(StudentFolder):
    """A stage of one member; `student` is what it has trained."""

    shape: ClassVar[type[Shape]] = Done

    @property
    def start(self) -> StudentFolder:
        """The converted student that the stage starts from, if the stage converts."""
        return StudentFolder(self.path / "start")

    @property
    def made(self) -> Path:
        """Data that were made right before the stage."""
        return self.path / "made"

    @property
    def counts(self) -> Path:
        """How many questions were kept of the data that models made for the stage."""
        return self.path / "made.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def objectives(self) -> Path:
        """Weights of the modules that belong to objectives, if there are any."""
        return self.path / "objectives.safetensors"

    @property
    def metrics(self) -> Path:
        """A line for each step."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """A line for each validation."""
        return self.path / "validation.jsonl"

    @property
    def skipped(self) -> Path:
        """A line for each sample that was skipped."""
        return self.path / "skipped.jsonl"

    def is_begun(self) -> bool:
        names = ("reference.safetensors", "reference.unfinished.safetensors")
        stored = any((self.path / name).exists() for name in names)
        return super().is_begun() or stored or any(self.checkpoints.glob("step-*"))


@dataclass(frozen=True)
class MemberFolder:
    """One student of a run."""

    path: Path

    @property
    def training(self) -> Path:
        """The recipe that is trained here."""
        return self.path / "training.yaml"

    @property
    def start(self) -> StudentFolder:
        """The student before its first stage, if it is converted or made from a config."""
        return StudentFolder(self.path / START)

    @property
    def replaced(self) -> Path:
        return self.path / REPLACED

    def stage(self, index: int, name: str) -> StageFolder:
        """The folder of a stage; `index` counts from 0."""
        return StageFolder(self.path / stage_name(index, name))

    def stages_from(self, index: int) -> list[StageFolder]:
        """The stages on the disk from `index` on, in order, whatever their names are."""
        found = [(_NUMBERED.match(f.name), f) for f in self.path.glob("*") if f.is_dir()]
        numbers = sorted((int(number[1]), f) for number, f in found if number is not None)
        return [StageFolder(f) for number, f in numbers if number > index]

    def is_started(self) -> bool:
        """Whether some student of it was made, or some checkpoint written."""
        return any(self.path.glob("*/done.json")) or any(self.path.glob("*/checkpoints/*"))


@dataclass(frozen=True)
class EvaluationFolder:
    """The scores of one model, its sample answers and its decoding times."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def request(self) -> Path:
        """What `results` answers: the model and the settings."""
        return self.path / "request.json"

    @property
    def answers(self) -> Path:
        """Answers to the recipe's sample questions."""
        return self.path / "answers.json"

    @property
    def decoding(self) -> Path:
        return self.path / "decode.json"

    def samples(self, task: str) -> Path:
        """The answers to a task, one line for each document."""
        return self.path / "samples" / f"{task}.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """A run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The run's recipe, with its variants."""
        return self.path / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def timings(self) -> Path:
        return self.path / "bench"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluation"

    def evaluation(self, label: str) -> EvaluationFolder:
        return EvaluationFolder(self.evaluations / label)

    def every_evaluation(self) -> Iterator[tuple[str, EvaluationFolder]]:
        """The evaluations on the disk by label, in order."""
        for path in sorted(self.evaluations.glob("*")):
            yield path.name, EvaluationFolder(path)

    def release(self, label: str) -> Path:
        return self.path / "release" / label

    def member(self, name: str) -> MemberFolder:
        """The folder of one of several members."""
        return MemberFolder(self.path / name)

    @property
    def only_member(self) -> MemberFolder:
        """The folder of the member of a run that has one: the run's folder itself."""
        return MemberFolder(self.path)

    def members(self) -> list[MemberFolder]:
        """The members on the disk, in order of their names."""
        if self.only_member.training.is_file():
            assistant = self.member(ASSISTANT)
            return [self.only_member, *[assistant] * assistant.training.is_file()]
        return [MemberFolder(p.parent) for p in sorted(self.path.glob("*/training.yaml"))]
