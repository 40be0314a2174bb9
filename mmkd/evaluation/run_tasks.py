"""Runs the tasks of an evaluation one after another, and keeps those that are finished."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import MmkdError, PeerError, one_line
from mmkd.evaluation.finished import FinishedTasks, facts_of
from mmkd.evaluation.refusals import describe, is_of_document
from mmkd.evaluation.scored import collect_scores, load_task, sample_of, simple_evaluate
from mmkd.evaluation.task_files import data_files
from mmkd.runtime import interrupt
from mmkd.runtime.progress import say

if TYPE_CHECKING:
    from mmkd.evaluation.adapter import MmkdModel
    from mmkd.evaluation.manager import ChosenTasks


def run_tasks(
    adapter: "MmkdModel",
    manager: "ChosenTasks",
    limit: int | None,
    finished: FinishedTasks,
    *,
    calibration: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Exception]]:
    """The results of each task, and the errors of the tasks that failed.

    Args:
        adapter: the model. All of its processes call this function.
        manager: the tasks.
        limit: number of documents of each task.
        finished: results of earlier calls.
        calibration: also compute the calibration on each task's true answers.

    Raises:
        Exception: all tasks failed, or an error that is not about one document occurred.
    """
    processes = adapter.processes
    given: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    for name in manager.chosen.names:
        interrupt.stop_here()  # a library may have swallowed the exception
        facts = _task_facts(name, manager)
        known = processes.from_first(partial(finished.read, name, facts))
        if known is not None:
            say(f"{name}: already answered")
        else:
            try:
                with processes.failing_together():
                    given_now = _run_task(adapter, name, manager, limit, calibration)
                    known = finished.write(name, facts, given_now)
            except Exception as error:
                interrupt.stop_here()
                if isinstance(error, PeerError):
                    raise
                if not isinstance(error, MmkdError) and not is_of_document(error):
                    raise
                say(f"{name}: failed ({one_line(error)})")
                failed[name] = error
                continue
            for task, found in known["unanswered"].items():
                say(describe(task, found))
        given.append(known)
    if not given:
        raise next(iter(failed.values()))
    return given, failed


def _run_task(
    adapter: "MmkdModel", name: str, manager: "ChosenTasks", limit: int | None, calibration: bool
) -> dict[str, Any]:
    """Scores, samples, calibration and costs of one task, or of one group of tasks."""
    from mmkd.evaluation.calibrate_tasks import calibrate_task, ece_scores

    started = time.perf_counter()
    tokens, answering = adapter.generated_tokens, adapter.generation_seconds
    if adapter.processes.size > 1:  # they would prepare the same files at once
        adapter.processes.from_first(partial(load_task, name, manager))
    raw = simple_evaluate(adapter, [name], manager, limit)
    scores = collect_scores(raw, [name])
    samples, unanswered = {}, {}
    calibrated: dict[str, Any] = {}
    for task in scores:
        adapter.refusals.require_answers(task)
        reasons = adapter.refusals.reasons.get(task, {})
        samples[task] = [sample_of(s, reasons.get(s["doc_id"])) for s in raw["samples"][task]]
        if found := adapter.refusals.of(task):
            unanswered[task] = found
        if calibration:
            template = manager.target_template(task)
            facts = calibrate_task(adapter, task, raw["samples"][task], template)
            calibrated |= {task: facts} if facts else {}
            scores[task] |= ece_scores(facts)
    return {
        "scores": scores,
        "samples": samples,
        "unanswered": unanswered,
        "calibration": calibrated,
        "tokens": adapter.generated_tokens - tokens,
        "generation_seconds": adapter.generation_seconds - answering,
        "seconds": time.perf_counter() - started,
    }


def _task_facts(name: str, manager: "ChosenTasks") -> list[list[Any]]:
    """Facts of a task's own file, its functions and its documents."""
    files: list[Path] = []
    every = manager.chosen.tasks
    for task in [t for t in every if t.name == name] or every:  # a group's name is no task's
        if task.path is not None:
            files += [task.path, *task.path.parent.glob("*.py")]  # its scoring functions
            files += data_files(dict(task.config), task.path.parent)
        if found := manager.local.get(task.name):
            files += [*found.files, *found.pictures]
    return facts_of(files)
