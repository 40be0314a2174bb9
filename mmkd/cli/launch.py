"""`mmkd run --nproc N`: N processes of one command on this machine.

torchrun does the same, and more for many machines; asked to stop, it gives a stage half a minute
to save, and it does not tell how the stage ended.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from mmkd.errors import AGAIN
from mmkd.runtime.interrupt import LAUNCHER, REPEAT_SECONDS, SIGNALS, held

GRACE_SECONDS = 10.0
"""Seconds that other processes may continue after one has failed."""

STOP_SECONDS = 600.0
"""How long processes that were asked to stop may take: for the rest of a step and for saving."""

REST_SECONDS = 30.0
"""How long they may take when the first of them has ended."""

POLL_SECONDS = 0.1


def launch(arguments: list[str], processes: int) -> int:
    """Run `mmkd ARGUMENTS` in that many processes; returns the exit status.

    SIGTERM and SIGINT are passed on, and all processes may end in their own time; a second one
    kills them, and so does the end of this process. When one fails, the others are stopped.
    """
    stop = _Stop()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop.pass_on)
    with held():
        stop.workers = workers = _start(arguments, processes)
    while any(worker.poll() is None for worker in workers):
        codes = [worker.poll() for worker in workers]
        if stop.killed:
            _wait(workers)
            return 128 + stop.number
        if any(code not in (None, 0, *stop.well) for code in codes):
            return _stop(workers)
        if stop.number and _kill_late(workers, stop.heard):
            return 128 + signal.SIGKILL
        time.sleep(POLL_SECONDS)
    if any(worker.returncode not in (0, *stop.well) for worker in workers):
        return 128 + stop.number if stop.killed else _stop(workers)
    return max(worker.returncode for worker in workers)


class _Stop:
    """Passes signals on to the processes.

    Attributes:
        workers: the processes.
        number: the first signal; 0 before it.
        heard: when it came, in seconds of `time.monotonic`.
        killed: a second one came, and the processes were killed.
        well: exit statuses in addition to 0 of processes that have stopped as they should.
    """

    def __init__(self) -> None:
        self.workers: list[subprocess.Popen] = []
        self.number = 0
        self.heard = 0.0
        self.killed = False
        self.well: tuple[int, ...] = ()

    def pass_on(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.number and now - self.heard < REPEAT_SECONDS:
            return
        if self.number:
            self.killed = True
            number = signal.SIGKILL
        else:
            self.number, self.heard, self.well = number, now, (128 + signal.SIGINT,)
        for worker in self.workers:
            worker.send_signal(number)


def _start(arguments: list[str], processes: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        LAUNCHER: str(os.getpid()),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "mmkd.cli", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def _kill_late(workers: list[subprocess.Popen], heard: float) -> bool:
    """Kill processes that were asked to stop and hang; whether there were any."""
    now = time.monotonic()
    late = [i for i, worker in enumerate(workers) if worker.poll() is None]
    if len(late) < len(workers):  # the others have ended: these follow in a moment, or never
        _wait(workers, REST_SECONDS)
        late = [i for i in late if workers[i].poll() is None]
    elif now - heard < STOP_SECONDS:
        return False
    for i in late:
        workers[i].kill()
        seconds = time.monotonic() - heard
        print(
            f"mmkd: process {i} did not stop within {seconds:.0f} s and was killed -- {AGAIN}",
            file=sys.stderr,
        )
    return bool(late)


def _stop(workers: list[subprocess.Popen]) -> int:
    """End the other processes after one has failed; returns its status."""
    codes = {i: code for i, w in enumerate(workers) if (code := w.poll()) not in (None, 0)}
    # One that was killed comes first: the others fail because of it.
    failed = min(codes, key=lambda i: codes[i] > 0)
    status = codes[failed]
    if status < 0:
        print(
            f"mmkd: process {failed} was killed ({signal.Signals(-status).name}) -- {AGAIN}",
            file=sys.stderr,
        )
    _wait(workers, GRACE_SECONDS)  # they may be about to say what is wrong themselves
    for worker in workers:
        worker.kill()
    return status if status > 0 else 128 - status


def _wait(workers: list[subprocess.Popen], seconds: float = GRACE_SECONDS) -> None:
    """Wait for the end of all of them, for so many seconds."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.1, deadline - time.monotonic()))
