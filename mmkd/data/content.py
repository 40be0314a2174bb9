"""Values of foreign rows, and the images that they name."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from mmkd.errors import DataError

MEDIA = frozenset(
    f"{kind}{end}"
    for kind in ("video", "audio", "speech", "sound", "music", "waveform", "point_cloud",
                 "pointcloud")
    for end in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls", "_bytes")
)  # fmt: skip
PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes", "source")
FILE_URL = re.compile(r"^file:(//(localhost(?=/))?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Index:
    """A placeholder that names one of the record's images by its number."""

    number: int


def printable(value: Any, longest: int = 120) -> str:
    """Foreign text on one line of a message: no control characters, not endless."""
    try:
        text = str(value)[: longest + 1]
    except Exception:  # numbers of thousands of digits, lists in lists in lists
        text = f"<{type(value).__name__}>"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else text[:longest] + "..."


def given(value: Any) -> bool:
    """Whether a value is there: where a row has none, tables write None, "" or empty lists."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, list | tuple):
        return any(map(given, value))
    if isinstance(value, dict):
        return any(map(given, value.values()))
    if isinstance(value, bool | int | float):
        return bool(value) and not is_null(value)
    return value is not None


def first_of(row: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that is given, or else of the first that is not None."""
    found = [row[key] for key in keys if row.get(key) is not None]
    return next(filter(given, found), found[0] if found else None)


def is_null(value: Any) -> bool:
    """None, or the NaN that pandas writes for it."""
    return value is None or value != value


def unread(key: str, begin: str = "the record has") -> DataError:
    """The error for a key whose content is not read; a source can ignore such keys."""
    what = "media" if str(key).lower() in MEDIA else "content"
    return DataError(
        f"{begin} {what} under {printable(key)!r}, which is not read",
        hint="drop the record, or name the key in 'ignore' of its source",
        kind=f"{what} under {printable(key)!r}",
    )


def listed(row: dict[str, Any], hint: str) -> Any:
    """The value under `images` or `image` of a record or a turn; [] where there is none.

    Args:
        row: the record or the turn.
        hint: what to do where both are given.

    Raises:
        DataError: the two keys name different images.
    """
    found = [row[key] for key in ("images", "image") if given(row.get(key))]
    if len(found) > 1 and pictures_of(found[0]) != pictures_of(found[1]):
        raise different("image", "images", hint)
    return found[0] if found else []


def different(one: str, other: str, hint: str) -> DataError:
    """The error for two keys of which only one can be read."""
    return DataError(f"{one!r} and {other!r} say different things", hint=hint)


def pictures_of(said: Any) -> list[Any]:
    """The images under a record's or a turn's `images` or `image`, one or a list, without those
    that are null."""
    found = said if isinstance(said, list) else [said]
    return [picture_of(one) for one in found if given(one)]


def picture_of(said: Any) -> Any:
    """An image as `mmkd.data.images.load_image` takes it.

    Args:
        said: a path, a `file:` or `data:` URL, {bytes, path}, {url}, {base64}, {data} of a base64
            source, a member of an archive, or a decoded image.

    Raises:
        DataError: it is a web address, or its base64 is damaged.
    """
    if isinstance(said, dict) and not isinstance(said.get("bytes"), bytes):
        if isinstance(encoded := first_of(said, "base64", "data"), str):
            return _decoded(encoded)
        said = first_of(said, "url", "path")
    if not isinstance(said, str):
        return said
    name, colon, _ = said[:8].partition(":")
    scheme = name.lower() if colon else ""
    if scheme == "data":
        head, _, encoded = said.partition(",")
        if not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
            raise DataError(
                f"a data URL is not an image in base64: {printable(head, 60)}",
                hint="write data:image/png;base64,...",
                kind="a data URL is not an image",
            )
        return _decoded(encoded)
    if scheme == "file":
        return unquote(FILE_URL.sub("", said))
    if scheme in ("http", "https", "s3", "gs", "hf") and "://" in said[:10]:
        raise DataError(
            f"{printable(said)} is a web address, and mmkd downloads no images",
            hint="download it, and give its path",
            kind="image is a web address",
        )
    return said


def _decoded(encoded: str) -> dict[str, Any]:
    _, _, encoded = encoded.rpartition(";base64,")
    try:
        return {"bytes": base64.b64decode("".join(encoded.split()), validate=True), "path": None}
    except (binascii.Error, ValueError) as error:
        raise DataError(
            "an image's base64 is damaged", hint="encode the file again, or drop it"
        ) from error


def resolved(shown: Sequence[Any], images: Any) -> list[Any]:
    """A record's images in the order of their placeholders.

    Args:
        shown: for each placeholder, as in `mmkd.data.turns.Conversation`.
        images: the value under the record's `images` or `image`.

    Raises:
        DataError: placeholders name images that are not there, or not all of them.
    """
    own = pictures_of(images)
    numbers = [s.number for s in shown if isinstance(s, Index)]
    named = [s for s in shown if s is not None and not isinstance(s, Index)]
    if not numbers and not named:
        return own
    if max(len(numbers), len(named)) < len(shown):
        raise DataError(
            "some image placeholders name their image and others do not",
            hint="name all of them, or none",
        )
    if named:
        if own and own != named:
            raise DataError(
                f"there are other images in the turns ({len(named)}) than under 'images' "
                f"({len(own)})",
                hint="keep one of the two",
                kind="other images in the turns than under 'images'",
            )
        return named
    every = images if isinstance(images, list) else [images]
    there = {i for i, one in enumerate(every) if given(one)}
    if set(numbers) != there:
        raise DataError(
            f"image placeholders have the indices {sorted(set(numbers))}, but the images are "
            f"{sorted(there)}",
            hint="refer to every image, counted from 0",
            kind="indices of placeholders and images differ",
        )
    return [picture_of(every[number]) for number in numbers]
