"""Training that is interrupted at a chosen step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmkd.training import stage


class BrokenOffError(Exception):
    pass


@contextmanager
def broken_off(when: Callable[[stage.Stage, int], bool]) -> Iterator[None]:
    """Break a run off before the first step of a stage for which `when` is true.

    The block ends there, without an error.
    """
    step = stage.Stage.step

    def watched(self: stage.Stage, number: int, batches: Any) -> Any:
        if when(self, number):
            raise BrokenOffError
        return step(self, number, batches)

    stage.Stage.step = watched  # type: ignore[method-assign]
    try:
        yield
    except BrokenOffError:
        pass
    finally:
        stage.Stage.step = step  # type: ignore[method-assign]
