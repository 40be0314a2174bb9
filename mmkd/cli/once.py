"""Prints an error once if several processes of one launch fail in the same way."""

import fcntl
import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "mmkd-said-"
OLD_SECONDS = 3600.0


def is_first(message: str) -> bool:
    """Whether this process is the first of its launch on this machine to print a message.

    The processes of a launch have the same parent process. A small file in the system's temporary
    folder counts the processes that call this with the same message. The last one removes it.

    Args:
        message: the error line.
    """
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or count < 2:
        return True
    launch = f"{os.getuid()} {os.getppid()} {_begun(os.getppid())} {message}"
    name = PREFIX + hashlib.sha256(launch.encode()).hexdigest()[:24]
    try:
        return _count(Path(tempfile.gettempdir()) / name, count) == 1
    except OSError:  # no such folder, or a full disk: twice is better than never
        return True


def _count(path: Path, most: int) -> int:
    """Count this process in a file; the number of processes so far, this one included."""
    _clean(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, b".")
        number = os.fstat(handle).st_size
        if number >= most:
            path.unlink(missing_ok=True)
        return number
    finally:
        os.close(handle)


def _clean(folder: Path) -> None:
    """Remove the files of earlier launches in which a process was killed."""
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > OLD_SECONDS:
                path.unlink()


def _begun(process: int) -> str:
    """The start time of a process, which distinguishes it from an earlier one with the same id."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:  # not Linux
        return ""
    return stat.rpartition(")")[2].split()[19]
