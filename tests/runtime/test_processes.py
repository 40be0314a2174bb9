"""An error of one process is an error of all, and none waits forever."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmkd.errors import DataError, EvaluationError, PeerError, StoppedError
from mmkd.runtime import distributed, interrupt
from mmkd.runtime.processes import ALONE, Processes
from tests.support.ranks import on_ranks


def test_one_process_needs_no_others() -> None:
    assert ALONE.own([1, 2, 3]) == [1, 2, 3]
    assert ALONE.exchange("a") == ["a"]
    assert ALONE.from_first(lambda: 7) == 7
    with pytest.raises(ValueError, match="own"), ALONE.failing_together():
        raise ValueError("own")


def test_values_and_shares_are_in_the_order_of_ranks(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        all_of_them = Processes(rank, 3)
        own = all_of_them.own(range(7))
        return all_of_them.exchange(own), all_of_them.from_first(lambda: f"of {rank}")

    assert on_ranks(work, 3, tmp_path) == [([[0, 3, 6], [1, 4], [2, 5]], "of 0")] * 3


UNSENDABLE = "RuntimeError: UnsendableError: not sendable"


class UnsendableError(Exception):
    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


def outcome(processes: Processes, fails: BaseException | None, moment: str) -> str:
    """What a process raises, and that it can go on with the others afterwards."""
    try:
        with processes.failing_together():
            if moment == "before" and fails is not None:
                raise fails
            processes.exchange(1)
            if moment == "after" and fails is not None:
                raise fails
        found = "nothing"
    except (Exception, StoppedError) as error:
        found = f"{type(error).__name__}: {error}"
    assert processes.exchange(processes.rank) == [0, 1, 2]
    return found


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_one_process_is_raised_by_all(
    moment: str, failing: int, tmp_path: Path
) -> None:
    def work(rank: int) -> str:
        error = DataError("it is broken", where="here", hint="mend it")
        return outcome(Processes(rank, 3), error if rank == failing else None, moment)

    assert on_ranks(work, 3, tmp_path) == ["DataError: here: it is broken -- mend it"] * 3


def test_what_an_error_holds_reaches_all(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        try:
            with Processes(rank, 2).failing_together():
                if rank == 1:
                    raise EvaluationError("failed", where="a", hint="b", scores={"t": {"m": 1.0}})
        except EvaluationError as error:
            return error.what, error.where, error.hint, error.scores
        return None

    assert on_ranks(work, 2, tmp_path) == [("failed", "a", "b", {"t": {"m": 1.0}})] * 2


@pytest.mark.parametrize("error", [StoppedError("stopped"), UnsendableError("not", "sendable")])
def test_all_kinds_of_errors_are_told(error: BaseException, tmp_path: Path) -> None:
    def work(rank: int) -> str:
        return outcome(Processes(rank, 3), error if rank == 1 else None, "after")

    said = "StoppedError: stopped" if isinstance(error, StoppedError) else UNSENDABLE
    assert on_ranks(work, 3, tmp_path) == [said] * 3


def test_all_raise_the_error_of_the_first_of_several(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        return outcome(Processes(rank, 3), ValueError(f"of {rank}") if rank else None, "before")

    found = on_ranks(work, 3, tmp_path)
    assert found == ["ValueError: of 1"] * 3


def test_blocks_inside_of_blocks_tell_an_error_once(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        processes = Processes(rank, 3)
        try:
            with processes.failing_together():
                processes.from_first(lambda: 1 / 0)
        except ZeroDivisionError as error:
            assert processes.exchange(rank) == [0, 1, 2]
            return str(error)
        return "nothing"

    assert on_ranks(work, 3, tmp_path) == ["division by zero"] * 3


def test_a_signal_waits_for_the_end_of_an_exchange(tmp_path: Path) -> None:
    """The first process waits in an exchange when its signal comes; the others answer later."""

    def work(rank: int) -> Any:
        processes, found = Processes(rank, 2), []
        with interrupt.listening():
            interrupt.hear()
            if rank == 0:
                timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM])
                timer.start()
            else:
                time.sleep(1)
            try:
                with processes.failing_together():
                    for turn in range(9):
                        found.append(processes.exchange((rank, turn)))
            except StoppedError as error:
                return found, str(error).partition(" -- ")[0], interrupt.requested()
        return found

    [first, second] = on_ranks(work, 2, tmp_path)
    assert first == ([[(0, 0), (1, 0)]], "stopped", True)
    assert second == ([[(0, 0), (1, 0)]], "stopped", False)


def test_a_process_that_is_gone_is_an_error_of_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        processes = Processes(rank, 2)
        if rank == 1:
            distributed.dist.destroy_process_group()
            return "gone"
        try:
            with processes.failing_together():
                processes.exchange(1)
        except PeerError as error:
            return str(error)
        return "nothing"

    assert "lost the connection" in on_ranks(work, 2, tmp_path)[0]
