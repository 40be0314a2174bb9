"""Which keys of a record have content that is not read: they are refused, and all others are
metadata (`source`, `model`, `width`, `score`, ...)."""

import re
from typing import Any

from PIL import Image

from mmkd.data.content import (
    IMAGE_TYPES,
    MEDIA,
    PICTURE_KEYS,
    ROLES,
    given,
    pictures_of,
    role_of,
    unread,
)
from mmkd.errors import DataError

READ = frozenset(
    {"id", "idx", "image", "images", "conversations", "messages", "texts", "chosen", "rejected",
     "prompt", "question", "objects", "unfinished"}
)  # fmt: skip
SAID = frozenset(
    {"system", "system_prompt", "history", "tools", "functions", "documents", "kto_tag",
     "rejected_response", "rejected_messages"}
)  # fmt: skip
"""Keys that other tools make part of the conversation, or that say how it is trained on."""
PICTURE = re.compile(
    r"(image|img|picture|photo|screenshot)s?(_?\d+)?(_(path|file|filename|url|uri|base64|b64)s?)?"
)
"""Keys that can name a picture. A record may have them beside `image` or `images`."""


def refuse_unread(row: dict[str, Any]) -> None:
    """Check that nothing of a record's content would be passed over.

    Args:
        row: a record as it stands in its file.

    Raises:
        DataError: it has media, pictures or a part of the conversation under a key that is not
            read, or says one thing under two keys.
    """
    for key in row.keys() - READ:
        name = key.lower() if isinstance(key, str) else ""
        value = row[key]
        if ((name in MEDIA or name in SAID) and given(value)) or _is_file(value):
            raise unread(key)
        if name == "kto_tag" and value is not None:  # false says what is not to be learnt
            raise unread(key)
    _refuse_twice(row)
    _refuse_unnamed_pictures(row)


def _is_file(value: Any) -> bool:
    """Whether a value holds a file's content, as columns of pictures, sound or video do."""
    if isinstance(value, list):
        return any(map(_is_file, value[:1]))
    if isinstance(value, dict):
        return any(map(_is_file, value.values()))
    return isinstance(value, bytes | Image.Image)


def _refuse_twice(row: dict[str, Any]) -> None:
    if _both(row, "image", "images") and pictures_of(row["image"]) != pictures_of(row["images"]):
        raise _different("image", "images")
    if row.get("chosen") and row.get("rejected"):
        return
    whole = any(given(row.get(key)) for key in ("conversations", "messages", "texts"))
    for alone, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if whole and given(row.get(alone)):
            raise DataError(
                f"the record has {alone!r} without {other!r}", mend=f"add {other!r}, or drop it"
            )
    said = [row.get(key) for key in ("conversations", "messages")]
    if _both(row, "conversations", "messages") and _words(said[0]) != _words(said[1]):
        raise _different("conversations", "messages")


def _both(row: dict[str, Any], one: str, other: str) -> bool:
    return given(row.get(one)) and given(row.get(other))


def _different(one: str, other: str) -> DataError:
    return DataError(
        f"{one!r} and {other!r} say different things",
        mend="drop one of them, or name it in 'ignore' of the source",
    )


def _words(turns: Any) -> Any:
    """A conversation's roles and text, whatever its schema."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        return turns
    return [(ROLES.get(str(role_of(t))), t.get("content") or t.get("value")) for t in turns]


def _refuse_unnamed_pictures(row: dict[str, Any]) -> None:
    """A record whose pictures all stand under other keys would be trained without them."""
    names = [k for k in row.keys() - READ if isinstance(k, str) and PICTURE.fullmatch(k.lower())]
    named = sorted(key for key in names if given(row[key]))
    if not named or given(row.get("image")) or given(row.get("images")) or _shows_pictures(row):
        return
    raise DataError(
        f"its picture is named under {named[0]!r}, which is not read",
        mend="name it under 'image', or the key in 'ignore' of its source",
        kind=f"a picture under {named[0]!r}",
    )


def _shows_pictures(row: dict[str, Any]) -> bool:
    """Whether the turns have pictures of their own."""
    said = [_list(row.get(k)) for k in ("conversations", "messages", "prompt", "chosen")]
    turns = [turn for some in said for turn in some]
    parts = [part for turn in turns for part in _list(turn.get("content"))]
    own = any(given(t.get("images")) or given(t.get("image")) for t in turns)
    return own or any(p.get("type") in IMAGE_TYPES or _names(p) for p in parts)


def _names(part: dict[str, Any]) -> bool:
    return any(given(part.get(key)) for key in PICTURE_KEYS)


def _list(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
