"""Commands. Each parses its arguments and calls one function. An error is printed as one line, with
exit status 2."""

import os
import sys
from typing import NoReturn

from mmkd import interrupt
from mmkd.errors import AGAIN, FROM_THE_START, MmkdError, PeerError, StoppedError


def main() -> None:
    """Entry point of `mmkd`."""
    interrupt.end_with_launcher()
    # For a stop before the command itself runs: these two always continue.
    words = sys.argv[1:3]  # launchers put --local_rank before the command
    hint = AGAIN if "run" in words or "cache" in words else FROM_THE_START
    with interrupt.listening(hint):
        try:
            _run()
        except StoppedError as end:
            _stopped(end)
        except MmkdError as error:
            _fail(error)
        except (ImportError, RecursionError):
            # A signal in the middle of an import can show as a failed import.
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
    # Imported inside `listening`: this takes a moment, and a signal may come.
    from mmkd.cli import cache, data, models, release, runs, setup  # noqa: F401
    from mmkd.cli.app import app

    app()


def _stopped(end: StoppedError) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:  # one line, however many processes have stopped
        print(f"mmkd: {end}")
    _end(interrupt.status())


def _fail(error: MmkdError) -> NoReturn:
    if interrupt.requested() and isinstance(error, PeerError):  # another process stopped first
        _stopped(StoppedError("stopped", mend=AGAIN))
    print(f"mmkd: {error}", file=sys.stderr)
    _end(2)


def _end(status: int) -> NoReturn:
    """Exit. Of several processes each exits at once: gloo's threads may abort a slow exit."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as in mmkd.distributed, which imports torch
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
