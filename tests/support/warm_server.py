"""Starts commands by forking a process that has imported what they need; see `tests.support.warm`.

    python -m tests.support.warm_server FD

FD is a socket. Each message on it holds a command and the file descriptors of its streams.
"""

import array
import atexit
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from tests.support.places import ROOT

MODULES = [
    *(f"mmkd.cli.{name}" for name in ("cache", "data", "models", "release", "runs", "setup")),
    *("mmkd.cli.launch", "mmkd.runs.pipeline", "mmkd.commands.build_cache", "mmkd.report.page"),
    *("datasets", "peft", "torch._dynamo", "torch.utils.data", "torch.distributed"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"),
    *("transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama"),
    "transformers.models.clip.modeling_clip",
]
"""What a run imports sooner or later."""

STREAMS = 3


def main() -> None:
    for name in MODULES:
        import_module(name)
    if find_spec("deepspeed"):
        import_module("deepspeed")
    sys.path[:] = [path for path in sys.path if path != str(ROOT)]  # users do not have it
    import mmkd.cli.launch

    mmkd.cli.launch.subprocess = _Forking  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for pytest
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes that wait for commands
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            message, handles = _receive(requests)
            if not message:
                return
            if os.fork() == 0:
                requests.close()
                _wait_for(json.loads(message), handles)
            for handle in handles:
                os.close(handle)


def _receive(requests: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its file descriptors: stdin, stdout, stderr, and where the status goes."""
    message, handles, *_ = socket.recv_fds(requests, 2**20, STREAMS + 1)
    return message, list(handles)


def _wait_for(request: dict[str, Any], handles: list[int]) -> NoReturn:
    """Start the command, write its process id and then its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = handles
    process = os.fork()
    if process == 0:
        os.close(status)
        if request["session"]:
            os.setsid()
        os.chdir(request["cwd"])
        if (largest := request["largest"]) is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        _become(request["words"], request["env"], streams)
    for stream in streams:
        os.close(stream)
    os.write(status, array.array("i", [process]).tobytes())
    _, code = os.waitpid(process, 0)
    os.write(status, array.array("i", [os.waitstatus_to_exitcode(code)]).tobytes())
    os._exit(0)


def _become(words: list[str], env: dict[str, str], streams: list[int]) -> NoReturn:
    """Be `python -m mmkd.cli WORDS`."""
    for number, handle in enumerate(streams):
        if handle != number:
            os.dup2(handle, number)
    for handle in streams:
        if handle >= STREAMS:
            os.close(handle)
    os.environ.clear()
    os.environ.update(env)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else 0)
    sys.argv = ["mmkd", *words]
    status = 0
    try:
        runpy.run_module("mmkd.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Forking:
    """The module `subprocess` for `mmkd.cli.launch`: `Popen` of mmkd forks this process."""

    TimeoutExpired = subprocess.TimeoutExpired

    class Popen(subprocess.Popen):
        def _execute_child(self, args: Any, *more: Any, **settings: Any) -> None:
            words = list(args)
            env = more[5] if len(more) > 5 else settings["env"]
            assert words[:4] == [sys.executable, "-P", "-m", "mmkd.cli"], words
            self.pid = os.fork()
            if self.pid == 0:
                _become(words[4:], env, [0, 1, 2])
            self._child_created = True


if __name__ == "__main__":
    main()
