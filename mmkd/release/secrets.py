"""What of a student's folder must not be published."""

from pathlib import Path

from mmkd.errors import CheckpointError
from mmkd.redact import find_secret

HEADER = 2**26
"""Bytes of a safetensors' header that are read: its free texts stand in front of the tensors."""


def refuse_secrets(path: Path, student: Path) -> None:
    """Refuse a file that would leave this machine with a secret, or from outside of the folder.

    Args:
        path: the file.
        student: the folder that is published.

    Raises:
        CheckpointError: it looks like it holds a token, a key or a login, or is a link that leads
            out of the folder.
    """
    name = path.relative_to(student).as_posix()
    if not path.resolve().is_relative_to(student.resolve()):
        raise CheckpointError(
            f"{name} is a link to a file outside of the student's folder",
            where=str(student),
            mend="take it away, or put the file itself there",
        )
    what = find_secret(name, named=False) or find_secret(_text(path), named=False)
    if what is not None:
        raise CheckpointError(
            f"{name} seems to hold {what}, and a release publishes it",
            where=str(student),
            mend="take it out of the file, and revoke it if it was published before",
        )


def _text(path: Path) -> str:
    """A file's bytes as text; of weights, the header."""
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return file.read().decode("latin-1")
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, HEADER)).decode("latin-1")
