"""Finds and scores the models of `mmkd eval`: the students of a run, or one model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import CheckpointError, EvaluationError, MmkdError, PeerError, nearest, one_line
from mmkd.runtime import interrupt
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from mmkd.evaluation.result import EvaluationResult
    from mmkd.report.rundata import Run

Scores = dict[str, Mapping[str, Mapping[str, float]]]
"""{label: {task: {metric: value}}}."""


@dataclass(frozen=True)
class Asked:
    """Models and the tasks that they are scored on.

    Attributes:
        models: {label: folder or Hub id}.
        is_run: the models are a run's students.
    """

    models: dict[str, str]
    tasks: list[str]
    include: Path | None
    local: Path | None
    is_run: bool = False


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
        student: label of one of the run's students; None is all of them.
        tasks: names of lmms-eval tasks; None takes those of the run's recipe.
        include, local: as in a recipe's `evaluate`; None takes those of the run's recipe if `tasks`
            is None too.

    Raises:
        MmkdError: no tasks are named, or the run has no such student or no finished one.
    """
    if not _is_run(model):
        _refuse_label(model, student)
        if tasks is None:
            raise MmkdError(
                "no tasks to evaluate", where=model, hint="name some, such as --tasks pope"
            )
        return Asked({Path(model).absolute().name: model}, tasks, include, local)
    from mmkd.report.rundata import read_run

    run = read_run(Path(model))
    wanted = run.recipe.get("evaluate") or {}
    if tasks is None:
        tasks = list(wanted.get("tasks") or [])
        include = include or _found(run, wanted.get("include"))
        local = local or _found(run, wanted.get("local"))
    if not tasks:
        raise MmkdError("its recipe names no tasks", where=model, hint="name some with --tasks")
    return Asked(_students(run, student), tasks, include, local, True)


def find_student(
    model: str, label: str | None, *, choose: str = "choose one with --student"
) -> dict[str, str]:
    """{label: folder or Hub id} of one finished student of a run's folder, or of the model itself.

    Args:
        model: a run's folder, a model's folder or a Hub id.
        label: of one of the run's students.
        choose: the hint if there are several.

    Raises:
        MmkdError: the run has no such student, no finished one, or several.
    """
    if not _is_run(model):
        _refuse_label(model, label)
        return {model: model}
    from mmkd.report.rundata import read_run

    found = _students(read_run(Path(model)), label)
    if len(found) > 1:
        raise MmkdError(
            f"the run has {len(found)} finished students",
            where=model,
            hint=f"{choose}: {', '.join(found)}",
        )
    return found


def find_trained(run: Path | None, name: str) -> str:
    """The folder or Hub id of a student.

    Args:
        run: a run's folder; None without one.
        name: a folder, the label of a finished student of the run, or a Hub id without a run.

    Raises:
        MmkdError: the run has no such student, no finished one, or several; a label without a run.
    """
    if run is not None and not Path(name).is_dir():
        found = find_student(str(run), name, choose="choose one")
    elif "/" in name or Path(name).is_dir():
        found = find_student(name, None, choose="name the folder of one")
    else:
        raise MmkdError(
            "no such folder, and only a run has students with labels",
            where=name,
            hint="check the path, or give the run's folder in place of the recipe",
        )
    return next(iter(found.values()))


def _is_run(model: str) -> bool:
    return RunFolder(Path(model)).recipe.is_file() and not Path(model, "config.json").is_file()


def _refuse_label(model: str, label: str | None) -> None:
    if label is not None:
        raise MmkdError(
            "not a run's folder, and --student names a student of one",
            where=model,
            hint="leave --student out",
        )


def _found(run: "Run", path: str | None) -> Path | None:
    return None if path is None else run.find(path)


def _students(run: "Run", label: str | None) -> dict[str, str]:
    members = [m for m in run.members if label is None or label in (m.label, m.group)]
    if not members and label is not None:
        known = list(dict.fromkeys(name for m in run.members for name in (m.group, m.label)))
        raise MmkdError(
            f"the run has no student {label!r}",
            where=str(run.folder.path),
            hint=nearest(label, known),
        )
    found = {m.label: str(m.finished_student) for m in members if m.finished_student is not None}
    for member in members:
        if member.label not in found:
            reason = "its last student is gone" if member.done else "not finished"
            say(f"{member.label}: {reason}, left out")
    if not found:
        gone = any(member.done for member in members)
        raise CheckpointError(
            "its students are gone" if gone else "no student of this run is finished",
            where=str(run.folder.path),
            hint="bring the last stage's folder back"
            if gone
            else "run its recipe again: it goes on where it stopped",
        )
    return found


def score_models(
    asked: Asked,
    out: Path | None,
    *,
    on_result: "Callable[[str, EvaluationResult], None] | None" = None,
    **settings: Any,
) -> tuple[Scores, list[EvaluationError]]:
    """Scores of each model, and the errors. A model that fails does not stop the others.

    Args:
        asked: the models and tasks, from `find_models`.
        out: folder for results; a run's students get one folder each inside.
        on_result: is called with the label and the result of each model that has all scores.
        settings: further arguments of `mmkd.evaluation.run.evaluate`.
    """
    from mmkd.evaluation.run import evaluate

    scores: Scores = {}
    failed = []
    for label, model in asked.models.items():
        place = out / label if out is not None and asked.is_run else out
        if len(asked.models) > 1:
            say(f"{label}: {model}")
        try:
            result = evaluate(
                model,
                tasks=asked.tasks,
                include_path=asked.include,
                local=asked.local,
                out=place,
                **settings,
            )
            scores[label] = result.scores
            if on_result is not None:
                on_result(label, result)
        except EvaluationError as error:  # of some of its tasks
            failed.append(error)
            scores[label] = error.scores
        except MmkdError as error:
            interrupt.stop_here()
            if len(asked.models) == 1 or isinstance(error, PeerError):
                raise
            say(f"{label}: its evaluation failed ({one_line(error)})")
            failed.append(EvaluationError(error.what, where=error.where, hint=error.hint))
    return scores, failed
