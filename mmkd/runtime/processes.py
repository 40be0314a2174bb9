"""Work that several processes do together, in which an error of one is an error of all.

All processes call the same functions in the same order. A process that fails says so where the
others wait for it, so none of them waits forever.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from mmkd.errors import StoppedError, one_line
from mmkd.runtime import distributed

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

        Raises:
            Exception: the error of a process that has failed in `failing_together`.
        """
        if self.size == 1:
            return [value]
        found: list[T | _Failure] = distributed.gather([value])
        for one in found:
            if isinstance(one, _Failure):
                setattr(one.error, TOLD, True)
                raise one.error
        return found  # type: ignore[return-value]

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
        the end of the block."""
        try:
            yield
            self.exchange(None)
        except (Exception, StoppedError) as error:
            known = getattr(error, TOLD, False) or distributed.explained(error) is not None
            if self.size > 1 and not known:
                setattr(error, TOLD, True)
                distributed.gather([_Failure(_sendable(error))])
            raise


ALONE = Processes()
"""This process, without others."""


def all_processes() -> Processes:
    """The processes of the launcher."""
    return Processes(distributed.rank(), distributed.world_size())


@dataclass(frozen=True)
class _Failure:
    """What a process says in place of a value when it has failed."""

    error: BaseException


def _sendable(error: BaseException) -> BaseException:
    """The error, or one with the same text if other processes could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error) if isinstance(error, Exception) else str(error))
    return error
