"""Keys of a record whose content mmkd does not read.

Records with such keys are refused. All other keys are metadata (`source`, `model`, `width`, ...).
"""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmkd.data.content import MEDIA, PICTURE_KEYS, different, given, unread
from mmkd.data.turns import IMAGE_TYPES, ROLES, TRAINED, TURN_KEYS, role_of
from mmkd.errors import DataError

READ = frozenset(
    {"id", "idx", "image", "images", "conversations", "messages", "texts", "chosen", "rejected",
     "prompt", "question", "objects", "unfinished"}
)  # fmt: skip
SAID = frozenset(
    {"system", "system_prompt", "history", "tools", "functions", "documents", "kto_tag",
     "rejected_response", "rejected_messages"}
)  # fmt: skip
"""Keys that other tools use as a part of the conversation, or to decide what is trained on."""
CONVERSATIONS = ("conversations", "messages", "texts")
TURNS = (*CONVERSATIONS, "prompt", "chosen", "rejected")
"""Keys of a record that contain turns."""
ONE_OF_THEM = "drop one of them, or name it in 'ignore' of the source"
PICTURE = re.compile(
    r"(image|img|picture|photo|screenshot)s?(_?\d+)?(_(path|file|filename|url|uri|base64|b64)s?)?"
)
"""Keys that can name an image. They are refused only in records without `image` and `images`."""


def without(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Remove the keys that a source ignores from a record.

    They are removed from its turns too, if mmkd refuses them there: `text` may be metadata of a
    record, but in a turn it is the text.
    """
    if not keys:
        return row
    row = {key: value for key, value in row.items() if key not in keys}
    refused = {key for key in keys if key.lower() in {*MEDIA, *TURN_KEYS, *TRAINED, *SAID}}

    def left(said: Any) -> Any:
        if isinstance(said, list):
            return list(map(left, said))
        if isinstance(said, dict):
            return {key: value for key, value in said.items() if key not in refused}
        return said

    return {key: left(value) if key in TURNS else value for key, value in row.items()}


def refuse_unread(row: dict[str, Any]) -> None:
    """Check that no content of a record would be ignored.

    Args:
        row: a record as in its file.

    Raises:
        DataError: it has media, images or a part of the conversation under a key that mmkd does not
            read, or different conversations under two keys.
    """
    for key in row.keys() - READ:
        name = key.lower() if isinstance(key, str) else ""
        value = row[key]
        if ((name in MEDIA or name in SAID) and given(value)) or _is_file(value):
            raise unread(key)
        if name == "kto_tag" and value is not None:  # false marks a rejected answer
            raise unread(key)
    _refuse_in_texts(row)
    _refuse_twice(row)
    _refuse_unnamed_pictures(row)


def _is_file(value: Any) -> bool:
    """Whether a value is a file's content, as in columns of images, sound or video."""
    if isinstance(value, list):
        return any(map(_is_file, value[:1]))
    if isinstance(value, dict):
        return any(map(_is_file, value.values()))
    return isinstance(value, bytes | Image.Image)


def _refuse_in_texts(row: dict[str, Any]) -> None:
    """Check The Cauldron's exchanges, in which mmkd reads question and answer."""
    for exchange in _list(row.get("texts")):
        for key, value in exchange.items():
            name = str(key).lower()
            unread_here = name in MEDIA or name in SAID or PICTURE.fullmatch(name)
            if unread_here and given(value):
                raise unread(key, "an exchange of 'texts' has")


def _refuse_twice(row: dict[str, Any]) -> None:
    """Check that a record does not have different conversations under two keys."""
    if row.get("chosen") and row.get("rejected"):
        return
    found = [key for key in CONVERSATIONS if given(row.get(key))]
    for alone, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if found and given(row.get(alone)):
            raise DataError(
                f"the record has {alone!r} without {other!r}", hint=f"add {other!r}, or drop it"
            )
    for other in found[1:]:
        if other == "texts" and not _list(row[other]):  # strings, which are metadata
            continue
        if _words(row, other) != _words(row, found[0]):
            raise different(found[0], other, ONE_OF_THEM)


def _words(row: dict[str, Any], key: str) -> Any:
    """The roles and texts of a conversation in any schema."""
    turns = row[key]
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        return turns
    if key == "texts":
        return [(role, t.get(role)) for t in turns for role in ("user", "assistant")]
    return [(ROLES.get(str(role_of(t))), t.get("content") or t.get("value")) for t in turns]


def _refuse_unnamed_pictures(row: dict[str, Any]) -> None:
    """Refuse a record whose images are all under unknown keys. It would be trained without them."""
    names = [k for k in row.keys() - READ if isinstance(k, str) and PICTURE.fullmatch(k.lower())]
    named = sorted(key for key in names if given(row[key]))
    if not named or given(row.get("image")) or given(row.get("images")) or _shows_pictures(row):
        return
    raise DataError(
        f"its image is named under {named[0]!r}, which is not read",
        hint="name it under 'image', or the key in 'ignore' of its source",
        kind=f"an image under {named[0]!r}",
    )


def _shows_pictures(row: dict[str, Any]) -> bool:
    """Whether the turns have images of their own."""
    said = [_list(row.get(k)) for k in ("conversations", "messages", "prompt", "chosen")]
    turns = [turn for some in said for turn in some]
    parts = [part for turn in turns for part in _list(turn.get("content"))]
    own = any(given(t.get("images")) or given(t.get("image")) for t in turns)
    return own or any(p.get("type") in IMAGE_TYPES or _names(p) for p in parts)


def _names(part: dict[str, Any]) -> bool:
    return any(given(part.get(key)) for key in PICTURE_KEYS)


def _list(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
