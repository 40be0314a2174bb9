"""Refuses files of a student's folder that must not be published."""

import re
from collections.abc import Iterator
from pathlib import Path

from mmkd.errors import CheckpointError
from mmkd.redact import find_secret

ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
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
            hint="remove the link, or put the file itself there",
        )
    # `password = ...` stands in programs and tokenizers too, but hidden files are neither.
    hidden = any(part.startswith(".") for part in path.relative_to(student).parts)
    what = find_secret(name, named=False)
    for text in _texts(path):
        what = what or find_secret(text, named=hidden)
    if what is not None:
        raise CheckpointError(
            f"{name} seems to hold {what}, and a release publishes it",
            where=str(student),
            hint="remove it, and revoke it if it was published before",
        )


def _texts(path: Path) -> Iterator[str]:
    """The content of a file as text, then decoded in each way in which a secret can be encoded; of
    a safetensors file, its header."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            size = int.from_bytes(file.read(8), "little")
            content = file.read(min(size, HEADER))
        else:
            content = file.read()
    yield (text := content.decode("latin-1"))
    if "\0" in text[:HEADER]:  # UTF-16, for example
        yield text.replace("\0", "")
    if "\\u" in text:
        yield ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)
