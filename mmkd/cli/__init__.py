"""The commands. Each command parses its arguments and calls one function. Errors are printed as one
line, with exit status 2."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from mmkd.cli.once import is_first
from mmkd.errors import AGAIN, FROM_THE_START, MmkdError, PeerError, StoppedError
from mmkd.runtime import interrupt


def entry() -> None:
    """Entry point of the process of a command."""
    try:
        main()
    except _StoppedExit as end:
        interrupt.ignore()
        # A stop can break off the import of a library in C++, which may abort Python's own exit.
        atexit._run_exitfuncs()
        _exit_now(end.status)
    finally:
        interrupt.ignore()  # the exit status is decided, and Ctrl-C may come several times


def main() -> None:
    """Run the command of `sys.argv`; always raises SystemExit."""
    os.environ["PYTHONSAFEPATH"] = "1"  # processes of libraries import nothing from this folder
    interrupt.end_with_launcher()
    # For a stop before the command itself runs: these two always continue.
    words = sys.argv[1:3]  # launchers put --local_rank before the command
    hint = AGAIN if "run" in words or "cache" in words else FROM_THE_START
    with interrupt.listening(hint):
        try:
            interrupt.hear()
            _run()
        except StoppedError as end:
            _stopped(end)
        except Exception as error:
            # A library can turn a stop into an error of its own, such as an import that failed.
            if (stop := interrupt.broken_off()) is not None:
                _stopped(stop)
            _fail(_explained(error))


def _explained(error: Exception) -> MmkdError:
    """The message of an exception for users. Other exceptions are raised again."""
    if isinstance(error, MmkdError):
        return error
    if isinstance(error, ValueError):
        from mmkd.runtime.fields import explained as refused

        if (said := refused(error)) is not None:
            return said
    if isinstance(error, OSError | RuntimeError):
        from mmkd.runtime.distributed import explained
        from mmkd.runtime.files import disk_error

        known = disk_error(error) or explained(error)
        if known is not None:
            return known
    raise error


def _run() -> None:
    # Imported inside `listening`: this takes a moment, and a signal may come.
    from mmkd.cli import cache, calibrate, data, models, release, runs, setup  # noqa: F401
    from mmkd.cli.app import app
    from mmkd.runtime.progress import log_to_console

    log_to_console()
    app()


def _stopped(end: StoppedError) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:  # one line for all processes
        print(f"mmkd: {end}")
    if _has_peers():
        _exit_now(interrupt.status())
    raise _StoppedExit(interrupt.status())


def _fail(error: MmkdError) -> NoReturn:
    if interrupt.requested() and isinstance(error, PeerError):  # another process stopped first
        _stopped(StoppedError("stopped", hint=AGAIN))
    if is_first(str(error)):
        print(f"mmkd: {error}", file=sys.stderr)
    if _has_peers():
        _exit_now(2)
    sys.exit(2)


class _StoppedExit(SystemExit):
    """The exit of a command that a signal has stopped.

    Attributes:
        status: the exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _has_peers() -> bool:
    """Whether this is one of several processes: gloo's threads may abort a slow exit of one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1  # mmkd.runtime.distributed imports torch


def _exit_now(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(status)
