"""Work that several processes do together, in which an error of one is an error of all.

All processes call the same functions in the same order. A process that fails says so where the
others wait for it, so none of them waits forever.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mmkd.errors import PeerError, StoppedError, one_line
from mmkd.runtime import distributed, interrupt

T = TypeVar("T")
TOLD = "_all_processes_know"
"""Set on an error that all processes raise."""


@dataclass(frozen=True)
class Processes:
    """The processes that do some work together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """This process's share: items r, r + R, r + 2R, ... of rank r of R."""
        return list(items[self.rank :: self.size])

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks.

        Args:
            value: can be pickled, and has no tensors on a GPU.

        Raises:
            Exception: the error of the first process that has failed in `failing_together`.
            PeerError: another process is gone.
            StoppedError: this process was asked to stop.
        """
        if self.size == 1:
            return [value]
        interrupt.stop_here()
        found = _gather(value)
        error = _first_error(found)
        if error is not None:
            raise error
        return found

    def from_first(self, function: Callable[[], T]) -> T:
        """The result of a function that only the first process calls.

        Raises:
            Exception: its error, in all processes.
        """
        with self.failing_together():
            found = self.exchange(function() if self.is_first else None)[0]
        return found  # type: ignore[return-value]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If one process raises inside, all raise its error: where they next call `exchange`, or at
        the end of the block. If several do at once, all raise the error of the first one."""
        try:
            yield
            self.exchange(None)
        except (Exception, StoppedError) as error:
            if self.size == 1 or getattr(error, TOLD, False) or isinstance(error, PeerError):
                raise
            if distributed.explained(error) is not None:  # an exchange of a library
                raise
            own = _sendable(error)
            found = _gather(_Failure(own))
            found[self.rank] = _Failure(own)  # the same object, with its traceback
            first = _first_error(found)
            if first is error:
                raise
            assert first is not None
            raise first from error


ALONE = Processes()
"""This process, without others."""


def all_processes() -> Processes:
    """The processes of the launcher."""
    return Processes(distributed.rank(), distributed.world_size())


@dataclass(frozen=True)
class _Failure:
    """What a process says in place of a value when it has failed."""

    error: BaseException


def _gather(value: Any) -> list[Any]:
    """The values of all processes. A signal waits: one that raised between the messages of an
    exchange would leave the others with half of them.

    Raises:
        PeerError: another process is gone.
    """
    try:
        with interrupt.postponed():
            return distributed.gather([value])
    except Exception as error:
        raise distributed.explained(error) or error from error


def _first_error(found: Sequence[Any]) -> BaseException | None:
    """The error of the first process that has failed; None without any."""
    failure = next((one for one in found if isinstance(one, _Failure)), None)
    if failure is None:
        return None
    setattr(failure.error, TOLD, True)
    return failure.error


def _sendable(error: BaseException) -> BaseException:
    """The error, or one with the same text if other processes could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error) if isinstance(error, Exception) else str(error))
    return error
