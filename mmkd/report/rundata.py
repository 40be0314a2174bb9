"""Read a run's folder for the report. Missing and damaged parts are left out."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError
from mmkd.recipe import ANSWER_CE, TEACHER_KL
from mmkd.runtime.files import read_yaml, tensors_in
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import (
    TEACHER,
    EvaluationFolder,
    MemberFolder,
    RunFolder,
    StageFolder,
)
from mmkd.runtime.shapes import (
    Answered,
    Answers,
    Decoding,
    Done,
    Provenance,
    Results,
    Shape,
    StageCounts,
    Started,
    Written,
    read_if,
)
from mmkd.runtime.steplog import read_lines
from mmkd.runtime.teacher_hacking import Hacking, found_in

Scores = Mapping[str, Mapping[str, float]]
Load = dict[str, list[float]]  # layer -> share of tokens of each expert
SHARE = "mixture/"
"""Beginning of the name of a metric that is the share of a source."""


@dataclass(frozen=True)
class StageLog:
    """One stage of one member.

    Attributes:
        config: the stage in the resolved recipe.
        lines: numbers of metrics.jsonl, one per step.
        loads: shares of tokens of the experts, one per step of a sparse student.
        done: the stage is finished.
        steps: number of steps; None if it is not known before the end.
        file: identifies metrics.jsonl: members that share a stage have the same file.
        validations: numbers of validation.jsonl, one line per validation.
        kept: the step whose student was kept, if it was chosen by validation.
        made: counts of the data that models made for the stage, by entry of `make`.
    """

    config: dict[str, Any]
    lines: list[dict[str, float]]
    loads: list[Load]
    done: bool
    steps: int | None
    file: int
    validations: list[dict[str, float]] = field(default_factory=list)
    kept: int | None = None
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.get("name", "?"))

    @cached_property
    def hacking(self) -> dict[str, Hacking]:
        """The first sign of teacher hacking, by the teacher's metric."""
        return found_in(self.validations, TEACHER_KL, ANSWER_CE)

    def total(self, key: str) -> float:
        return sum(line.get(key, 0.0) for line in self.lines)


@dataclass(frozen=True)
class MemberLog:
    """One student: a label that its seeds share, a seed, and its stages.

    Attributes:
        folder: of the student in the run.
        changes: descriptions of its conversions, one line each.
        student: the newest folder of a student that a stage has written.
    """

    label: str
    group: str
    seed: int
    folder: MemberFolder
    recipe: dict[str, Any]
    stages: list[StageLog]
    changes: list[str]
    student: Path | None

    @property
    def done(self) -> bool:
        return all(stage.done for stage in self.stages)

    @property
    def stage_folders(self) -> dict[str, StageFolder]:
        """The folder of each stage, by the stage's name."""
        return {s.name: self.folder.stage(i, s.name) for i, s in enumerate(self.stages)}

    @property
    def last(self) -> StageFolder:
        """The folder of its last stage."""
        return self.stage_folders[self.stages[-1].name]

    @property
    def finished_student(self) -> Path | None:
        """The folder that its last stage wrote; None if it is not finished or was deleted."""
        return self.student if self.done and self.student == self.last.student else None


@dataclass(frozen=True)
class Run:
    """Everything the report shows.

    Attributes:
        results: {label: content of its results.json}.
        decoding: {label: rows of its decode.json}, as `mmkd.evaluation.decode.DecodeRow`.
        answers: {label: content of its answers.json}, as `mmkd.evaluation.samples` writes it.
    """

    folder: RunFolder
    recipe: dict[str, Any]
    recipe_text: str
    provenance: dict[str, Any]
    members: list[MemberLog]
    results: dict[str, dict[str, Any]]
    decoding: dict[str, list[dict[str, float]]]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """Labels of students without their seeds, in the recipe's order."""
        return list(dict.fromkeys(m.group for m in self.members))

    def group_of(self, label: str) -> str:
        return next((m.group for m in self.members if m.label == label), label)

    def is_teacher(self, label: str) -> bool:
        return label == TEACHER and all(m.label != TEACHER for m in self.members)

    def find(self, path: str) -> Path:
        """A path of the recipe on this machine.

        It is relative to the folder in which the recipe was run. That is the working directory, or
        otherwise probably the folder that contains `output_dir`.
        """
        places = (Path(), self.folder.path.resolve().parent.parent)
        return next((p / path for p in places if (p / path).exists()), Path(path))

    @property
    def expected(self) -> int:
        """Number of students of the recipe. Students that have not started have no folder."""
        groups, seeds = 1 + len(self.recipe.get("variants") or {}), self.recipe.get("seeds") or [0]
        assistants = int(self.recipe.get("assistant") is not None)
        return max(groups * len(seeds) + assistants, len(self.members))

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The teacher's results."""
        return self.results.get(TEACHER) if self.is_teacher(TEACHER) else None


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        CheckpointError: the folder is not a run, or its recipe is damaged.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise CheckpointError(
            "not a run: it has no recipe.yaml",
            where=str(path),
            hint="give the folder that 'mmkd run' printed, such as runs/NAME",
        )
    recipe = _recipe(folder.recipe)
    decoding = _evaluations(folder, lambda files: files.decoding, Decoding)
    return Run(
        folder=folder,
        recipe=recipe,
        recipe_text=folder.recipe.read_text(encoding="utf-8"),
        provenance=read_if(Provenance, folder.provenance) or {},
        members=_members(folder, recipe),
        results=_evaluations(folder, lambda files: files.results, Results),
        decoding={label: held["rows"] for label, held in decoding.items()},
        answers=_evaluations(folder, lambda files: files.answers, Answers),
    )


def _recipe(path: Path) -> dict[str, Any]:
    """Read a recipe that a run has written.

    Raises:
        CheckpointError: it is damaged.
    """
    found = read_yaml(path)
    try:
        Written.model_validate(found)
    except ValueError as error:
        raise CheckpointError(
            "it is damaged, or not the recipe of a run",
            where=str(path),
            hint="bring the file back, or run the recipe again",
        ) from error
    return dict(found)


def _members(folder: RunFolder, recipe: dict[str, Any]) -> list[MemberLog]:
    found = [_member(member, member == folder.only_member) for member in folder.members()]
    groups = [recipe.get("label", "student"), *recipe.get("variants", {})]
    order = {name: i for i, name in enumerate(groups)}
    return sorted(found, key=lambda m: (order.get(m.group, len(order)), m.group, m.seed))


def _member(folder: MemberFolder, alone: bool) -> MemberLog:
    recipe = _recipe(folder.training)
    group = recipe.get("label", "student")
    configs = recipe.get("stages", [])
    folders = [folder.stage(i, c["name"]) for i, c in enumerate(configs)]
    stages = [_stage(f, c) for f, c in zip(folders, configs, strict=True)]
    students = [f.student for f in (folder.start, *folders)]
    return MemberLog(
        label=group if alone else folder.path.name,
        group=group,
        seed=int(recipe.get("seed", 0)),
        folder=folder,
        recipe=recipe,
        stages=stages,
        changes=[
            line
            for start in (folder.start, *(f.start for f in folders))
            for line in (read_if(Started, start.done) or {}).get("changes", [])
        ],
        student=next((s for s in reversed(students) if s.is_dir()), None),
    )


def _stage(folder: StageFolder, config: dict[str, Any]) -> StageLog:
    done = read_if(Done, folder.done)
    steps = done.get("steps") if done else config.get("steps")
    path = folder.metrics
    logged = read_lines(path)
    numbers = [a | _shares(b) for a, b in zip(_numbers(logged), logged, strict=True)]
    loads = [line["expert_load"] for line in logged if _is_load(line.get("expert_load"))]
    file = path.stat().st_ino if path.is_file() else 0
    validations = _numbers(read_lines(folder.validation))
    best = (config.get("validation") or {}).get("keep") == "best"
    kept = ((done or {}).get("validation") or {}).get("kept_step") if best else None
    made = (read_if(StageCounts, folder.counts) or {}).get("entries", {})
    return StageLog(config, numbers, loads, done is not None, steps, file, validations, kept, made)


def _numbers(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if _is_number(v)} for line in lines]


def _shares(line: dict[str, Any]) -> dict[str, float]:
    """Shares of the sources in a step, if they change (`data.sampling`)."""
    found = line.get("mixture")
    shares = found.items() if isinstance(found, dict) else ()
    return {f"{SHARE}{name}": share for name, share in shares if _is_number(share)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_load(value: Any) -> bool:
    """Whether a value has the share of tokens of each expert, by layer."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(v, list) and v and all(map(_is_number, v)) for v in value.values())


def _evaluations(
    folder: RunFolder, file: Callable[[EvaluationFolder], Path], shape: type[Shape]
) -> dict[str, dict[str, Any]]:
    """{label: content of a file of its evaluation}. Damaged files are logged and left out."""
    found = {}
    for label, files in folder.every_evaluation():
        path = file(files)
        if not path.exists():
            continue
        held = read_if(shape, path)
        if held is None:
            say(f"{path}: it is damaged and left out; `mmkd run` of the recipe writes it again")
        else:
            found[label] = held
    return found


def read_samples(run: Run, label: str, task: str) -> list[dict[str, Any]]:
    """A model's answers to one task; empty if they were not saved, or are damaged."""
    path = run.folder.evaluation(label).samples(task)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        for line in found:
            Answered.model_validate(line)
    except (OSError, ValueError, RecursionError):
        return []
    return found


def student_size(folder: Path | None) -> tuple[int, int] | None:
    """Number of parameters and bytes of a student's safetensors, from their headers.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        return None
    parameters = 0
    for path in files:
        parameters += sum(math.prod(shape) for _, shape in tensors_in(path).values())
    return parameters, sum(path.stat().st_size for path in files)


def ran_as_long(a: MemberLog, b: MemberLog) -> bool:
    """Whether both ran the same number of steps: `patience` may have stopped one of them early."""
    return all(
        len(x.lines) == len(y.lines) or not (x.config.get("validation") or {}).get("patience")
        for x, y in zip(a.stages, b.stages, strict=True)
    )
