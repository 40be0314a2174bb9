"""Compute results ahead of their use, in the worker processes of a data loader."""

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
    """Yields the results of tasks, in the order of the tasks.

    Args:
        work: function of a task.
        tasks: are read one by one in this process, `waiting` tasks per worker ahead of the results.
        workers: number of processes; 0 to compute each result in this process when it is needed.
        waiting: number of tasks that are read ahead, per worker.

    Yields:
        A result, or the `MmkdError` or `OSError` that `work` raised.

    Raises:
        PeerError: a worker has ended.
    """
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Worked(work),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(begin_worker, os.getpid()),
        prefetch_factor=waiting if workers else None,
        # A generator of its own: a loader draws a seed, and would change the global random state.
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
    """The data set of a worker process: results by their tasks."""

    def __init__(self, work: Callable[[Task], Result]):
        self.work = work

    def __getitem__(self, task: Task) -> Result | Exception:
        try:
            return self.work(task)
        except (MmkdError, OSError) as error:
            # Returned instead of raised: a loader would raise it with the worker's traceback as its
            # message.
            return error
