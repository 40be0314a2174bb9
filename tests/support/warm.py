"""Commands of mmkd in processes of their own that start within milliseconds.

Importing torch and transformers takes a process seconds. One server for each test worker imports
them once and forks for each command (`tests.support.warm_server`). Such a process is a real one,
with its own process id, streams, signals and children, and `--nproc` forks too. What it does not
test is the start of Python itself: tests of imports, launchers and stops while libraries load start
`python -m mmkd.cli`.
"""

import array
import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.places import ROOT

FIXED = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}
"""Variables that libraries read when they are imported: all warm commands have these values."""

_server: "tuple[subprocess.Popen, socket.socket] | None" = None


class Command:
    """A running command, with the methods of `subprocess.Popen`.

    Args:
        words: of `mmkd`.
        env: variables beside those of this process and `FIXED`.
        cwd: working directory.
        session: start it in a session of its own, as the first process of a terminal.
        largest: bytes that a file which it writes may have; None for no limit.
        merged: write stderr to stdout.
        log: file for the output; None keeps it in memory.
    """

    def __init__(
        self,
        *words: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        session: bool = False,
        largest: int | None = None,
        merged: bool = True,
        log: Path | None = None,
    ):
        assert not set(env or {}) & set(FIXED), "start `python -m mmkd.cli` with this variable"
        self.args = [str(word) for word in words]
        request = {
            "words": self.args,
            "env": {**os.environ, **FIXED, "CI": "true", **(env or {})},
            "cwd": str(cwd or Path.cwd()),
            "session": session,
            "largest": largest,
        }
        self._out = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115
        self._err = self._out if merged else tempfile.TemporaryFile()  # noqa: SIM115
        self.returncode: int | None = None
        reading, writing = os.pipe()
        self._status = os.fdopen(reading, "rb", buffering=0)
        with open(os.devnull, "rb") as nothing:
            handles = [nothing.fileno(), self._out.fileno(), self._err.fileno(), writing]
            socket.send_fds(_requests(), [json.dumps(request).encode()], handles)
        os.close(writing)
        self.pid = self._number()

    def _number(self) -> int:
        data = self._status.read(array.array("i").itemsize)
        assert data, "the server of warm commands has died"
        return array.array("i", data)[0]

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None and _readable(self._status, 0):
            self.returncode = self._number()
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not _readable(self._status, timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Output and errors, when it has ended; errors are empty where they are in the output."""
        self.wait(timeout)
        return _text(self._out), "" if self._err is self._out else _text(self._err)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *words: object, timeout: float = 300, **settings: Any
) -> "subprocess.CompletedProcess[str]":
    """Run `mmkd WORDS` to its end, as `subprocess.run` does; settings as in `Command`."""
    command = Command(*words, merged=False, **settings)
    try:
        out, err = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(command.args, command.wait(), out, err)


def _readable(file: Any, timeout: float | None) -> bool:
    import select

    return bool(select.select([file], [], [], timeout)[0])


def _text(file: Any) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")


def _requests() -> socket.socket:
    """The socket of this process's server, which is started at the first use."""
    global _server
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_server", str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, **FIXED, "PYTHONPATH": str(ROOT)},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        _server = process, ours
        atexit.register(ours.close)
    return _server[1]
