"""Calibration of a model on the documents of lmms-eval's tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from mmkd.data.schema import Record
from mmkd.errors import MmkdError
from mmkd.evaluation.adapter import MmkdModel, Request, evaluation_mode
from mmkd.evaluation.answer_options import options_of, truth_of
from mmkd.evaluation.calibration import Calibration, Exercise
from mmkd.evaluation.refusals import is_of_document
from mmkd.recipe import ANSWER_ECE, TOKEN_ECE
from mmkd.runtime import interrupt
from mmkd.runtime.progress import say, say_once

Documents = Sequence[Mapping[str, Any]]
Asked = tuple[Request, Mapping[str, Any], str]
"""A request, its document and the true answer."""


def calibrate_task(
    adapter: MmkdModel, task: str, documents: Documents, template: Any = None
) -> dict[str, Any]:
    """How well a model's confidence on a task's true answers matches its accuracy.

    Args:
        adapter: has answered the task.
        task: its name.
        documents: as lmms-eval logs them, with `doc_id`, `doc` and `target`.
        template: `doc_to_target` of the task.

    Returns:
        As `Calibration.facts`, with the number of documents that are left out: those without a true
        answer as text, and those that the model cannot be asked about. Empty if all of them are,
        or if the model is not supported.
    """
    try:
        found = Calibration(adapter.model, adapter.processor, task)
    except MmkdError as error:
        say_once(f"no calibration: {error.what}")
        return {}
    refused = adapter.refusals.reasons.get(task, {})
    usable: list[Asked] = []
    for logged in documents:
        number = logged["doc_id"]
        request = adapter.asked.get((task, number))
        truth = truth_of(logged["doc"], logged.get("target"), template)
        if request is not None and number not in refused and truth:
            usable.append((request, logged["doc"], truth))
    usable.sort(key=lambda asked: -asked[0].length)  # similar lengths need little padding
    hidden = adapter.rank != 0 or (None if adapter.progress is None else not adapter.progress)
    bar = tqdm(total=len(usable), desc="Calibrating", unit="question", disable=hidden)
    added = 0
    with evaluation_mode(adapter.model), bar:
        for start in range(0, len(usable), adapter.batch_size):
            interrupt.stop_here()
            part = usable[start : start + adapter.batch_size]
            try:
                added += _add(adapter, found, part)
            except ValueError as error:
                say(f"{task}: no calibration ({error})")
                return {}
            bar.update(len(part))
    left_out = len(documents) - added
    if left_out:
        say(f"{task}: {left_out:,} of {len(documents):,} documents have no calibration")
    return found.facts() | ({"left_out": left_out} if left_out else {}) if added else {}


def ece_scores(facts: Mapping[str, Any]) -> dict[str, float]:
    """The expected calibration errors of a task, by name of the metric."""
    names = {ANSWER_ECE: "answers", TOKEN_ECE: "tokens"}
    return {metric: facts[kind]["ece"] for metric, kind in names.items() if kind in facts}


def _add(adapter: MmkdModel, found: Calibration, part: list[Asked]) -> int:
    """Add a batch, and return the number of documents that were added. If the model or its
    processor refuses the batch, its halves are added one after the other.

    Raises:
        ValueError: a prediction is not finite.
        Exception: an error that is not about a document.
    """
    try:
        exercises = [_exercise(adapter, *asked) for asked in part]
        predicted = found.predict(exercises)
    except Exception as error:
        interrupt.stop_here()
        if not is_of_document(error):
            raise
        if len(part) == 1:
            return 0
        half = len(part) // 2
        return _add(adapter, found, part[:half]) + _add(adapter, found, part[half:])
    found.add(predicted)
    return len(part)


def _exercise(
    adapter: MmkdModel, request: Request, document: Mapping[str, Any], truth: str
) -> Exercise:
    turns, images = adapter.conversation(request)
    name = f"{request.task} document {request.doc_id}"
    return Exercise(Record(name, turns, images), truth, options_of(document, truth))
