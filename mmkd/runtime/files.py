"""Writes files and folders in one step: under a temporary name, flushed to disk, then renamed."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open

from mmkd.errors import CheckpointError
from mmkd.runtime.formats import FormatError, parse_json, parse_yaml

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


def partial_of(path: Path) -> Path:
    """The temporary name of a file or folder while it is written.

    No user's file has such a name; `conv.partial` next to `--out conv` may be a user's.
    """
    return path.with_name(f".{path.name}.mmkd.partial")


def _final(path: Path) -> Path:
    """The final path of a temporary path of `partial_of`; any other path unchanged."""
    name = path.name.removeprefix(".").removesuffix(".mmkd.partial")
    return path.with_name(name) if partial_of(path.with_name(name)) == path else path


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step. Several processes that call it take turns.

    Raises:
        OSError: it cannot be written; the file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with _claimed(partial) as file:
        try:
            file.truncate(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            error.filename = error.filename or str(path)
            raise


@contextmanager
def _claimed(path: Path) -> Iterator[TextIO]:
    """A file that no other process writes through this function at the same time."""
    while True:
        with open(path, "a", encoding="utf-8", opener=_without_links) as file:
            with suppress(OSError):  # a disk that knows no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file.fileno(), path):
                yield file
                return
        # Who had it before has renamed it meanwhile.


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file or folder still has this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary path; it is renamed at the end of the block.

    Yields:
        The temporary path, which the block must write.

    Raises:
        CheckpointError: it cannot be written; the temporary file is deleted.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync_file(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise _not_written(path, error) from error
    except BaseException:  # a stop too
        partial.unlink(missing_ok=True)
        raise


def _not_written(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"cannot write ({reason})", where=str(path), hint="free space and run again"
    )


def disk_error(error: Exception) -> CheckpointError | None:
    """The one-line error for a full disk or a path that cannot be used; None for other errors."""
    if not isinstance(error, OSError):
        return None
    if error.errno in FULL:
        what, hint = "cannot write", "free space and run the same command again"
    elif error.errno in FORBIDDEN and error.filename is not None:
        what, hint = "cannot be read or written", "check the path and its permissions"
    else:
        return None
    return CheckpointError(f"{what} ({error.strerror})", where=error.filename, hint=hint)


def from_here(path: Path) -> str:
    """A path relative to the working directory if it is in it, else unchanged.

    Args:
        path: an absolute path.
    """
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read.
        FormatError: it is not JSON, because it was cut for example.
    """
    return parse_json(path.read_bytes())


def tensors_in(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor of a safetensors file, by name; only its header is read.

    Raises:
        CheckpointError: the file is damaged or missing.
    """
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "its weights are damaged",
            where=str(path),
            hint="bring the file back, or delete the stage's folder to train it again",
        ) from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of a run.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is not YAML, because it was cut for example.
    """
    try:
        return parse_yaml(path.read_bytes())
    except FormatError as error:
        raise CheckpointError(
            f"not YAML: {error}",
            where=str(path),
            hint="bring the file back, or delete the run's folder",
        ) from error


def write_folder(path: Path, write: Callable[[Path], None], *, new: bool = False) -> None:
    """Write a folder under a temporary name and rename it when it is complete.

    Args:
        path: the folder. An existing folder is replaced.
        write: a function that writes into the folder that it is given.
        new: refuse to replace a folder that exists when the writing is finished.

    Raises:
        CheckpointError: it cannot be written, and the temporary folder is deleted; or another
            command is writing it.
    """
    partial = partial_of(path)
    with locked(partial):
        for old in partial.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        try:
            write(partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _not_written(path, error) from error
        except BaseException:  # a stop too
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for file in partial.rglob("*"):
            if file.is_file():
                sync_file(file)
        if new and path.exists():
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError("it is there already", where=str(path), hint="name a new folder")
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which is created if it does not exist.

    The lock ends with the block or with the process. Some network disks do not support locks; there
    is no lock then. Folders that were created for the lock are removed if they are still empty.

    Raises:
        CheckpointError: another process holds the lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _lock(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # something was written there
                path.rmdir()
        os.close(handle)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a lock on a file, which is created if it does not exist. The block may delete it.

    Raises:
        CheckpointError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path, lambda: path.open("ab").close())
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path, make: Callable[[], None]) -> int:
    """A handle of a folder or file; the lock ends when it is closed."""
    while True:
        make()
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # who had it has renamed or removed it meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise CheckpointError(
                "another command is writing there",
                where=str(_final(path)),
                hint="wait for it to end, or stop it",
            ) from error
        except OSError:  # this disk does not support locks
            pass
        if _is_at(handle, path):
            return handle
        os.close(handle)


def link_file(source: str | Path, target: str | Path) -> None:
    """Create a hard link to a file, or a copy where the disk does not support links."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def link_folder(source: Path, target: Path) -> None:
    """Create a folder with the same files, each by `link_file`."""
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=link_file)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the disk can do this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks
            raise
    finally:
        os.close(handle)
