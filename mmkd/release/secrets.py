"""Refuses files of a student's folder that must not be published."""

from pathlib import Path

from mmkd.errors import CheckpointError
from mmkd.redact import find_secret

HEADER = 2**26
"""Most bytes of a safetensors file's header that are searched; its metadata is in the header."""


def refuse_secrets(path: Path, student: Path) -> None:
    """Refuse a file that seems to contain a secret, or that is a link to another folder.

    Args:
        path: the file.
        student: the folder that is published.

    Raises:
        CheckpointError: its name or content seems to contain a token, a key or a login, or it is a
            link to a file outside the folder.
    """
    name = path.relative_to(student).as_posix()
    if not path.resolve().is_relative_to(student.resolve()):
        raise CheckpointError(
            f"{name} is a link to a file outside the student's folder",
            where=str(student),
            mend="remove the link, or put the file itself there",
        )
    what = find_secret(name, named=False) or find_secret(_text(path), named=False)
    if what is not None:
        raise CheckpointError(
            f"{name} seems to hold {what}, and a release publishes it",
            where=str(student),
            mend="remove it, and revoke it if it was published before",
        )


def _text(path: Path) -> str:
    """The content of a file as text; of a safetensors file, its header."""
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return file.read().decode("latin-1")
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, HEADER)).decode("latin-1")
