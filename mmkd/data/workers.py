"""Work that is done ahead of its use, in the worker processes of a data loader."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from mmkd.errors import MmkdError
from mmkd.runtime.distributed import explained
from mmkd.runtime.interrupt import begin_worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def work_ahead(
    work: Callable[[Task], Result], tasks: Iterator[Task], workers: int, *, waiting: int = 4
) -> Iterator[Result | Exception]:
    """The results of tasks, in the order of the tasks.

    Args:
        work: what is done with a task.
        tasks: taken one by one in this process, `waiting` for each worker ahead of the results.
        workers: processes; 0 to work in this one whenever a result is asked for.
        waiting: tasks.

    Yields:
        A result, or the `MmkdError` or `OSError` that `work` raised.

    Raises:
        PeerError: a worker is gone.
    """
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Worked(work),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(begin_worker, os.getpid()),
        prefetch_factor=waiting if workers else None,
        # Its own: a loader draws a seed, and a resumed run must not draw one more.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except RuntimeError as error:
        gone = explained(error)
        if gone is None:
            raise
        raise gone from error


def _as_it_is(result: Any) -> Any:
    return result


class _Worked(torch.utils.data.Dataset[Any], Generic[Task, Result]):
    """Results by their tasks; what a worker process holds."""

    def __init__(self, work: Callable[[Task], Result]):
        self.work = work

    def __getitem__(self, task: Task) -> Result | Exception:
        try:
            return self.work(task)
        except (MmkdError, OSError) as error:
            # Returned, not raised: a loader raises a worker's errors with the worker's traceback
            # as their message.
            return error
