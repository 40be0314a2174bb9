"""Calls in several threads, whose results are used in the calling thread."""

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, Queue, SimpleQueue
from typing import Generic, NamedTuple, TypeVar

from mmkd.runtime import interrupt

T = TypeVar("T")
R = TypeVar("R")

GRACE_S = 5.0
"""Seconds for which running calls are awaited after an error or a signal."""
_POLL_S = 0.1


class CancelledError(Exception):
    """A call has ended early because no further result is wanted."""


class _Done(NamedTuple, Generic[T, R]):
    item: T
    result: R


def in_threads(
    call: Callable[[T], R],
    items: Sequence[T],
    use: Callable[[T, R], None],
    *,
    threads: int,
    stop: threading.Event,
    tick: Callable[[], None],
) -> None:
    """Call a function for each item, and use each result in this thread as soon as it is there.

    After an error, or if the process is asked to stop, no further call begins. Results that come
    within `GRACE_S` are used. Calls that take longer are left alone; their threads end with them
    or with the process.

    Args:
        call: runs in the threads. It may raise `CancelledError` once `stop` is set.
        items: the arguments.
        use: gets each item with its result.
        threads: largest number of calls at the same time.
        stop: set when no further call is wanted; long waits of `call` should end then.
        tick: called in this thread several times a second.

    Raises:
        Exception: the first error of a call.
        StoppedError: the process was asked to stop.
    """
    todo: SimpleQueue[T] = SimpleQueue()
    for item in items:
        todo.put(item)
    done: Queue[_Done[T, R] | BaseException | None] = Queue()

    def work() -> None:
        try:
            while not stop.is_set():
                try:
                    item = todo.get_nowait()
                except Empty:
                    return
                done.put(_Done(item, call(item)))
        except CancelledError:
            pass
        except BaseException as error:
            done.put(error)
        finally:
            done.put(None)

    try:
        with interrupt.deferred():
            running = min(threads, len(items))
            for _ in range(running):
                threading.Thread(target=work, daemon=True).start()
            _use_results(done, use, running, stop, tick)
    finally:
        stop.set()


def _use_results(
    done: "Queue[_Done[T, R] | BaseException | None]",
    use: Callable[[T, R], None],
    running: int,
    stop: threading.Event,
    tick: Callable[[], None],
) -> None:
    """Use results until all threads have ended, or until `GRACE_S` after an error or a signal."""
    failed: BaseException | None = None
    until = float("inf")
    while running and time.monotonic() < until:
        tick()
        if not stop.is_set() and (failed is not None or interrupt.requested()):
            stop.set()
            until = time.monotonic() + GRACE_S
        try:
            found = done.get(timeout=_POLL_S)
        except Empty:
            continue
        if found is None:
            running -= 1
        elif isinstance(found, BaseException):
            failed = failed or found
        else:
            use(found.item, found.result)
    if failed is not None and not interrupt.requested():
        raise failed
