"""Checksums of files and of a model's weights."""

import hashlib
from functools import cache
from pathlib import Path

from mmkd.runtime.files import sha256


def file_hash(path: Path) -> str:
    """A file's sha256, made once by this process unless it changes."""
    facts = path.stat()
    return _sha256(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


@cache
def _sha256(path: Path, *facts: int) -> str:
    # Each stage of a run asks again.
    return sha256(path)


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
