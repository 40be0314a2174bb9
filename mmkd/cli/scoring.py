"""What `mmkd eval` scores: the students of a run, or one model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError, EvaluationError, MmkdError, nearest, one_line
from mmkd.progress import say

Scores = dict[str, Mapping[str, Mapping[str, float]]]
"""{label: {task: {metric: value}}}."""


@dataclass(frozen=True)
class Asked:
    """Models and the tasks that they are scored on.

    Attributes:
        models: {label: folder or Hub id}.
        is_run: they are a run's students.
        trust_remote_code: the run's recipe trusts the student's code.
    """

    models: dict[str, str]
    tasks: list[str]
    include: Path | None
    local: Path | None
    is_run: bool = False
    trust_remote_code: bool = False


def find_models(
    model: str,
    student: str | None,
    tasks: list[str] | None,
    include: Path | None,
    local: Path | None,
) -> Asked:
    """The finished students of a run's folder, or the model itself.

    Args:
        model: a run's folder, a model's folder or a Hub id.
        student: label of one of the run's students.
        tasks: names of lmms-eval tasks; of a run, its recipe's if None.
        include, local: as in a recipe's `evaluate`; of a run, its recipe's where `tasks` are.

    Raises:
        MmkdError: no tasks are named, or the run has no such student or no finished one.
    """
    if not (Path(model) / "recipe.yaml").is_file() or (Path(model) / "config.json").is_file():
        if student is not None:
            raise MmkdError("--student is of a run's folder", where=model, mend="leave it out")
        if tasks is None:
            raise MmkdError(
                "no tasks to evaluate", where=model, mend="name some, such as --tasks pope"
            )
        return Asked({Path(model).absolute().name: model}, tasks, include, local)
    from mmkd.report.rundata import read_run

    run = read_run(Path(model))
    wanted = run.recipe.get("evaluate") or {}
    if tasks is None:
        tasks = list(wanted.get("tasks") or [])
        include = include or _path(wanted.get("include"))
        local = local or _path(wanted.get("local"))
    if not tasks:
        raise MmkdError("its recipe names no tasks", where=model, mend="name some with --tasks")
    trusted = bool((run.recipe.get("student") or {}).get("trust_remote_code"))
    return Asked(_students(run, student), tasks, include, local, True, trusted)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _students(run: Any, label: str | None) -> dict[str, str]:
    members = [m for m in run.members if label is None or label in (m.label, m.group)]
    if not members and label is not None:
        known = list(dict.fromkeys(name for m in run.members for name in (m.group, m.label)))
        raise MmkdError(
            f"the run has no student {label!r}", where=str(run.folder), mend=nearest(label, known)
        )
    for member in members:
        if not member.done:
            say(f"{member.label}: not finished, left out")
    # A finished member's newest folder is its last stage's.
    found = {m.label: str(m.student) for m in members if m.done and m.student is not None}
    if not found:
        raise CheckpointError(
            "no student of this run is finished",
            where=str(run.folder),
            mend="run its recipe again: it goes on where it stopped",
        )
    return found


def score_models(
    asked: Asked, out: Path | None, *, trust_remote_code: bool, **settings: Any
) -> tuple[Scores, list[EvaluationError]]:
    """Scores of each model, and what failed; a model that fails does not stop the others.

    Args:
        asked: what `find_models` gave.
        out: folder for results; of a run's students, one in it for each.
        trust_remote_code: run code that a model's folder brings.
        settings: of `mmkd.evaluation.run.evaluate`.
    """
    from mmkd.evaluation.run import evaluate

    scores: Scores = {}
    failed = []
    for label, model in asked.models.items():
        place = out / label if out is not None and asked.is_run else out
        if len(asked.models) > 1:
            say(f"{label}: {model}")
        try:
            scores[label] = evaluate(
                model,
                tasks=asked.tasks,
                include_path=asked.include,
                local=asked.local,
                out=place,
                trust_remote_code=trust_remote_code or asked.trust_remote_code,
                **settings,
            ).scores
        except EvaluationError as error:  # of some of its tasks
            failed.append(error)
            scores[label] = error.scores
        except MmkdError as error:
            if len(asked.models) == 1:
                raise
            say(f"{label}: its evaluation failed ({one_line(error)})")
            failed.append(EvaluationError(error.what, where=error.where, mend=error.mend))
    return scores, failed
