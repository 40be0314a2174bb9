"""Checksums of files and of a model's weights, computed once by a process unless a file changes."""

import hashlib
from pathlib import Path

from mmkd.runtime.files import sha256

_known: dict[tuple[Path, int, int, int, int], str] = {}


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    key = stamp(path)
    if key not in _known:
        _known[key] = sha256(path)
    return _known[key]


def remember(path: Path, checksum: str) -> None:
    """Note the SHA-256 of a file as it is now, known from an earlier process."""
    _known[stamp(path)] = checksum


def forget() -> None:
    """Forget all checksums."""
    _known.clear()


def stamp(path: Path) -> tuple[Path, int, int, int, int]:
    """What changes with a file: its path, size, modification time, change time and inode."""
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def weights_hash(model: str | Path | None) -> str | None:
    """One hash over a model folder's weight files.

    Args:
        model: a folder, a Hub id, or nothing: "" and None are no folder, not the working directory.

    Returns:
        None where there is no such folder, or it holds no safetensors.
    """
    files = sorted(Path(model).glob("*.safetensors")) if model else []
    if not files:
        return None
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()
