"""Read values and images of rows in data files."""

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
    """A placeholder that refers to an image of the record by its index."""

    number: int


def printable(value: Any, longest: int = 120) -> str:
    """A value as text for a message: on one line, shortened, without control characters."""
    try:
        text = str(value)[: longest + 1]
    except Exception:  # numbers of thousands of digits, lists in lists in lists
        text = f"<{type(value).__name__}>"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else text[:longest] + "..."


def given(value: Any) -> bool:
    """Whether a value is given. In tables, missing values are None, "" or empty lists."""
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
    """The value of the first key with a given value, otherwise the first that is not None."""
    found = [row[key] for key in keys if row.get(key) is not None]
    return next(filter(given, found), found[0] if found else None)


def is_null(value: Any) -> bool:
    """Whether a value is None, or the NaN that pandas writes for it."""
    return value is None or value != value


def unread(key: str, begin: str = "the record has") -> DataError:
    """The error for a key with content that mmkd does not read. A source can ignore such keys."""
    what = "media" if str(key).lower() in MEDIA else "content"
    return DataError(
        f"{begin} {what} under {printable(key)!r}, which is not read",
        hint="drop the record, or name the key in 'ignore' of its source",
        kind=f"{what} under {printable(key)!r}",
    )


def listed(row: dict[str, Any], hint: str) -> Any:
    """The value of `images` or `image` in a record or a turn; [] if there is none.

    Args:
        row: the record or the turn.
        hint: for the error if both are given.

    Raises:
        DataError: the two keys name different images.
    """
    found = [row[key] for key in ("images", "image") if given(row.get(key))]
    if len(found) > 1 and pictures_of(found[0]) != pictures_of(found[1]):
        raise different("image", "images", hint)
    return found[0] if found else []


def different(one: str, other: str, hint: str) -> DataError:
    """The error for two keys of which only one can be read."""
    return DataError(f"{one!r} and {other!r} differ", hint=hint)


def pictures_of(said: Any) -> list[Any]:
    """The images of a record or a turn as a list, without null values; from one image or a list."""
    found = said if isinstance(said, list) else [said]
    return [picture_of(one) for one in found if given(one)]


def picture_of(said: Any) -> Any:
    """A reference to an image, as `mmkd.data.images.load_image` expects it.

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
        DataError: placeholders refer to missing images, or not to all images.
    """
    own = pictures_of(images)
    numbers = [s.number for s in shown if isinstance(s, Index)]
    named = [s for s in shown if s is not None and not isinstance(s, Index)]
    if not numbers and not named:
        return own
    if max(len(numbers), len(named)) < len(shown):
        raise DataError(
            "only some of the image placeholders name their image",
            hint="name the image in all of them, or in none",
        )
    if named:
        if own and own != named:
            raise DataError(
                f"the images in the turns ({len(named)}) differ from those under 'images' "
                f"({len(own)})",
                hint="keep one of the two",
                kind="images in the turns differ from those under 'images'",
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
