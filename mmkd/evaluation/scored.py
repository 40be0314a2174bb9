"""Runs lmms-eval's evaluator on a model in memory and reads scores and samples from its result."""

import io
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import torch

from mmkd.errors import MmkdError

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

Sample = dict[str, Any]


def simple_evaluate(
    adapter: Any, tasks: list[str], manager: "TaskManager", limit: int | None
) -> dict[str, Any]:
    """Ask a model all questions of some tasks, and score its answers; returns what lmms-eval does.

    Raises:
        MmkdError: the data cannot be used.
    """
    from lmms_eval import evaluator

    # some tasks print their categories' scores, or write them to the working directory
    with TemporaryDirectory() as scratch, _in_one_line(tasks), _without_barrier():
        found: dict[str, Any] | None = evaluator.simple_evaluate(
            model=adapter,
            tasks=list(tasks),
            task_manager=manager,
            batch_size=adapter.batch_size,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            process_docs_parallel=1,
            verbosity="ERROR",
            cli_args=Namespace(output_path=scratch, process_with_media=True),
        )
    return found or {}


def load_task(task: str, manager: "TaskManager") -> None:
    """Load the data of a task, so that they are in the cache of `datasets`; errors as of
    `simple_evaluate`."""
    from lmms_eval.tasks import get_task_dict

    with _in_one_line([task]):
        get_task_dict([task], manager, "chat")


@contextmanager
def _without_barrier() -> Iterator[None]:
    """Inside, lmms-eval loads data without waiting for the other processes of this one's group.
    They may be elsewhere, and one that stops or fails would leave the others in its barrier."""
    from lmms_eval import evaluator

    with mock.patch.object(evaluator, "torch", _TorchWithoutGroup()):
        yield


class _TorchWithoutGroup:
    """The module torch, in which no process group is initialized."""

    distributed = SimpleNamespace(is_initialized=lambda: False)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _in_one_line(tasks: Sequence[str]) -> Iterator[None]:
    """Hide what lmms-eval prints inside, and raise what it says of the data in one line."""
    from tenacity import RetryError

    where = ", ".join(tasks)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except RetryError as error:  # lmms-eval hides the cause after five retries
        refuse_data(error, where)
    except AssertionError as error:
        raise MmkdError(
            f"lmms-eval refuses the documents ({error})",
            where=where,
            hint="check the data; a limit must not part documents that are scored together",
        ) from error


def refuse_data(error: Any, where: str) -> NoReturn:
    """Raise the one-line error for a task's data that lmms-eval has tried to load several times.

    Args:
        error: tenacity's RetryError.
        where: name of the task.
    """
    cause = error.last_attempt.exception() or error
    if isinstance(cause, MmkdError):
        raise cause from None
    first = (str(cause).splitlines() or [""])[0]
    raise MmkdError(
        f"lmms-eval could not use the data ({type(cause).__name__}: {first})",
        where=where,
        hint="check its columns, the network and HF_HUB_OFFLINE, or give it as `local`",
    ) from cause


def collect_scores(raw: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """lmms-eval's {"metric,filter": value} as {task: {metric: value}}, without standard errors.

    Raises:
        MmkdError: an asked task has no scores, or fewer documents were answered than it has.
    """
    subtasks = raw.get("group_subtasks", {})
    scores: dict[str, dict[str, float]] = {}
    for task in [leaf for asked in tasks for leaf in _leaves(asked, subtasks)]:
        numbers = {
            _metric_name(key): float(value)
            for key, value in raw.get("results", {}).get(task, {}).items()
            if "_stderr" not in key and isinstance(value, int | float)
        }
        if not numbers:
            raise MmkdError(
                "lmms-eval returned no scores",
                where=task,
                hint="see its log: python -m lmms_eval --tasks ... --verbosity DEBUG",
            )
        expected = raw["n-samples"][task]["effective"]
        answered = len(raw.get("samples", {}).get(task, ()))
        if answered != expected:
            raise MmkdError(f"lmms-eval scored {answered} of {expected} documents", where=task)
        scores[task] = numbers
    return scores


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    below = subtasks.get(task) or []
    return [leaf for name in below for leaf in _leaves(name, subtasks)] if below else [task]


def _metric_name(key: str) -> str:
    metric, _, filter_name = key.partition(",")
    return metric if filter_name in ("", "none") else f"{metric}_{filter_name}"


def sample_of(logged: Mapping[str, Any], refused: str | None = None) -> Sample:
    """One line of `samples/<task>.jsonl`; `refused` says why the document could not be asked about.

    The scene tasks' verdicts say whether an answer is correct. Other tasks have lmms-eval's own
    fields only, and `correct` is None.
    """
    verdict = next((v for v in logged.values() if isinstance(v, Mapping) and "correct" in v), {})
    doc = logged["doc"]
    responses = logged["filtered_resps"]
    common = {
        "doc_id": logged["doc_id"],
        "question": doc.get("question", (logged.get("arguments") or [""])[0]),
        "answer": logged["target"],
        "prediction": responses[0] if responses else "",
        "correct": None,
    }
    kinds = {key: doc[key] for key in ("category", "kind") if key in doc}
    sample = {**common, **kinds, **verdict}
    return sample if refused is None else {**sample, "correct": False, "unanswered": refused}
