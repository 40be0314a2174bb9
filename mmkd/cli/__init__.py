"""Commands. Each parses its words and calls one function; errors are one line, exit status 2."""

import os
import sys
from typing import NoReturn

from mmkd import interrupt
from mmkd.errors import AGAIN, FROM_THE_START, MmkdError, PeerError, StoppedError


def main() -> None:
    """Entry point of `mmkd`."""
    interrupt.end_with_launcher()
    # A stop before the command itself runs must not say that a run begins from the start.
    hint = AGAIN if sys.argv[1:2] in (["run"], ["cache"]) else FROM_THE_START
    with interrupt.listening(hint):
        try:
            _run()
        except StoppedError as end:
            _stopped(end)
        except MmkdError as error:
            _fail(error)
        except (ImportError, RecursionError):
            # A signal in the middle of an import can come out as an import that failed.
            if interrupt.requested():
                _stopped(StoppedError("stopped", mend=hint))
            raise
        except (OSError, RuntimeError) as error:
            from mmkd.distributed import explained
            from mmkd.files import disk_error

            known = disk_error(error) or explained(error)
            if known is None:
                raise
            _fail(known)


def _run() -> None:
    # Not before signals are heard: this takes a moment.
    from mmkd.cli import cache, data, models, release, runs, setup  # noqa: F401
    from mmkd.cli.app import app

    app()


def _stopped(end: StoppedError) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:  # one line, however many processes have stopped
        print(f"mmkd: {end}")
    _end(interrupt.status())


def _fail(error: MmkdError) -> NoReturn:
    if interrupt.requested() and isinstance(error, PeerError):  # the other one was faster to stop
        _stopped(StoppedError("stopped", mend=AGAIN))
    print(f"mmkd: {error}", file=sys.stderr)
    _end(2)


def _end(status: int) -> NoReturn:
    """Exit; at once where other processes are connected, whose threads may abort a slow exit."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as in mmkd.distributed, which imports torch
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
