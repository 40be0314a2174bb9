"""Calibration of a model on the documents of lmms-eval's tasks."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from tqdm import tqdm

from mmkd.data.schema import Record
from mmkd.errors import MmkdError
from mmkd.evaluation.adapter import MmkdModel, Request, evaluation_mode
from mmkd.evaluation.answer_options import options_of, truth_of
from mmkd.evaluation.calibration import Calibration, Exercise, Predicted
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
    size = adapter.batch_size
    batches = [usable[start : start + size] for start in range(0, len(usable), size)]
    total = sum(map(len, adapter.processes.own(batches)))
    bar = tqdm(total=total, desc="Calibrating", unit="question", disable=hidden)
    own: list[list[Predicted]] = []
    with evaluation_mode(adapter.model), bar:
        for part in adapter.processes.own(batches):
            interrupt.stop_here()
            own.append(_predict(adapter, found, part))
            bar.update(len(part))
            if not all(predicted.is_finite() for predicted in own[-1]):
                break  # the others would not be used
    added = 0
    try:
        for predicted in _in_order(adapter.processes.exchange(own)):
            found.add(predicted)
            added += predicted.exercises
    except ValueError as error:
        say(f"{task}: no calibration ({error})")
        return {}
    left_out = len(documents) - added
    if left_out:
        say(f"{task}: {left_out:,} of {len(documents):,} documents have no calibration")
    return found.facts() | ({"left_out": left_out} if left_out else {}) if added else {}


def ece_scores(facts: Mapping[str, Any]) -> dict[str, float]:
    """The expected calibration errors of a task, by name of the metric."""
    names = {ANSWER_ECE: "answers", TOKEN_ECE: "tokens"}
    return {metric: facts[kind]["ece"] for metric, kind in names.items() if kind in facts}


def _in_order(shares: Sequence[Sequence[list[Predicted]]]) -> list[Predicted]:
    """The predictions of all processes in the order of the batches, from the batches of each."""
    turns = zip_longest(*shares, fillvalue=())
    return [predicted for turn in turns for batch in turn for predicted in batch]


def _predict(adapter: MmkdModel, found: Calibration, part: list[Asked]) -> list[Predicted]:
    """The predictions of a batch. If the model or its processor refuses it, its halves are tried
    one after the other.

    Raises:
        Exception: an error that is not about a document.
    """
    try:
        exercises = [_exercise(adapter, *asked) for asked in part]
        return [found.predict(exercises)]
    except Exception as error:
        interrupt.stop_here()
        if not is_of_document(error):
            raise
        if len(part) == 1:
            return []
        half = len(part) // 2
        return _predict(adapter, found, part[:half]) + _predict(adapter, found, part[half:])


def _exercise(
    adapter: MmkdModel, request: Request, document: Mapping[str, Any], truth: str
) -> Exercise:
    turns, images = adapter.conversation(request)
    name = f"{request.task} document {request.doc_id}"
    return Exercise(Record(name, turns, images), truth, options_of(document, truth))
