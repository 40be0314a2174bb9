"""Commands. Each parses its words and calls one function; errors are one line, exit status 2."""

import os
import sys
from typing import NoReturn

from mmkd.cli import cache, data, models, release, runs, setup  # noqa: F401
from mmkd.cli.app import app
from mmkd.errors import MmkdError, StoppedError


def main() -> None:
    """Entry point of `mmkd`."""
    try:
        app()
    except StoppedError as end:
        print(f"mmkd: {end}")
        _end(0)
    except MmkdError as error:
        _fail(error)
    except (OSError, RuntimeError) as error:
        from mmkd.distributed import explained
        from mmkd.files import disk_error

        known = disk_error(error) or explained(error)
        if known is None:
            raise
        _fail(known)


def _fail(error: MmkdError) -> NoReturn:
    print(f"mmkd: {error}", file=sys.stderr)
    _end(2)


def _end(status: int) -> NoReturn:
    """Exit; at once where other processes are connected, whose threads may abort a slow exit."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as in mmkd.distributed, which imports torch
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
