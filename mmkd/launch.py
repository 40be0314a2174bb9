"""`mmkd run --nproc N`: N processes of one command on this machine.

torchrun does the same, and more for many machines; asked to stop, it does not wait for a stage to
save, nor tell how the stage ended.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from mmkd.errors import AGAIN

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1


def launch(arguments: list[str], processes: int) -> int:
    """Run `mmkd ARGUMENTS` in that many processes; returns the exit status.

    SIGTERM and SIGINT are passed on, and all processes may end in their own time; a second one
    kills them. When one fails, the others are stopped.
    """
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
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "mmkd.cli", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]

    heard: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        for worker in workers:
            worker.send_signal(signal.SIGKILL if heard else number)
        heard.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while all(worker.poll() in (None, 0) for worker in workers):
        if all(worker.poll() == 0 for worker in workers):
            return 0
        time.sleep(POLL_SECONDS)
    return _stop(workers)


def _stop(workers: list[subprocess.Popen]) -> int:
    """End the processes beside one that failed; returns its status."""
    codes = {i: code for i, w in enumerate(workers) if (code := w.poll()) not in (None, 0)}
    # One that was killed comes first: the others fail because of it.
    failed = min(codes, key=lambda i: codes[i] > 0)
    status = codes[failed]
    if status < 0:
        print(
            f"mmkd: process {failed} was killed ({signal.Signals(-status).name}) -- {AGAIN}",
            file=sys.stderr,
        )
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            # They may be about to say what is wrong themselves.
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    return status if status > 0 else 128 - status
