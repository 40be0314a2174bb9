"""Parse the turns of a conversation: text with images.

Published data sets refer to images in three ways:

    "<image>\\nWhat is this?"                        LLaVA: the record's next image
    {"type": "image"}, {"type": "image", "index": 1} the record's next image, or that one of them
    {"type": "image", "image": "a.png"}              the image itself (also `image_url`, `url`,
                                                     `path`, `base64`, `bytes`, `source`)

A part of a conversation that cannot be read raises an error; it is never ignored.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data.content import (
    MEDIA,
    PICTURE_KEYS,
    Index,
    first_of,
    given,
    is_null,
    listed,
    picture_of,
    pictures_of,
    printable,
    unread,
)
from mmkd.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
         "system": "system"}  # fmt: skip
PLACEHOLDER = "<image>"
TURN_KEYS = frozenset(
    {"tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking",
     "refusal"}
)  # fmt: skip
"""Keys of a turn that belong to the conversation, and that mmkd does not render."""
TRAINED = {"weight": 1, "loss_weight": 1, "loss": 1, "train": 1, "trainable": 1, "masked": 0}
"""Keys of a turn that decide whether it is trained on, each with its value for training."""
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
PART_KEYS = frozenset({"type", "text", "index", "detail", "cache_control", "annotations"})
NAMED_IN_TEXT = re.compile(r"<(img|audio|video)>[^<>\n]*\.\w{2,5}\s*</\1>")
Message = dict[str, Any]
"""{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}]}"""
Turns = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """A parsed conversation.

    Attributes:
        messages: with a part {"type": "image"} for each placeholder.
        shown: for each placeholder, None (the record's next image), an `Index`, or the image.
    """

    messages: list[Message]
    shown: list[Any]


def parse_turns(said: Any) -> list[dict[str, Any]]:
    """Check that a value is a list of turns.

    Raises:
        DataError: it is not.
    """
    if not isinstance(said, list) or not all(isinstance(t, dict) for t in said):
        raise DataError(
            "a conversation is not a list of turns", hint="give each turn a role and text"
        )
    return said


def role_of(turn: dict[str, Any]) -> Any:
    return first_of(turn, "role", "from")


def parse_conversation(turns: Turns) -> Conversation:
    """Parse turns into messages with placeholders, and the images of the placeholders.

    Raises:
        DataError: a turn has no known role, no text, or content that mmkd does not read.
    """
    messages: list[Message] = []
    shown: list[Any] = []
    for turn in turns:
        message, pictures = _message(turn)
        messages.append(message)
        shown += pictures
    return Conversation(messages, shown)


def _message(turn: dict[str, Any]) -> tuple[Message, list[Any]]:
    role, content = role_of(turn), first_of(turn, "content", "value", "text")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"unknown role {printable(role, 40)!r}",
            hint=f"known: {', '.join(ROLES)}",
            kind="unknown role",
        )
    _refuse_unread(turn, role)
    parts: list[dict[str, Any]] = []
    shown: list[Any] = []
    if isinstance(content, str):
        parts = _split_placeholders(content)
        shown = [None for part in parts if part["type"] == "image"]
    elif isinstance(content, list):
        for said in content:
            found = _part(said)
            parts += [part for part, _ in found]
            shown += [picture for part, picture in found if part["type"] == "image"]
    elif content is not None:
        raise _no_text(role)
    parts, shown = _with_own(turn, parts, shown)
    if not parts and content != []:
        raise _no_text(role)
    message = {"role": ROLES[role], "content": parts}
    _check_text(message)
    return message, shown


def _no_text(role: str) -> DataError:
    return DataError(
        f"a turn of {role!r} has no text", hint="give it a value", kind="a turn has no text"
    )


def _refuse_unread(turn: dict[str, Any], role: str) -> None:
    """Raise DataError for a key that belongs to the conversation and is not rendered."""
    for key, value in turn.items():
        name = str(key).lower()
        if name in MEDIA or name in TURN_KEYS:
            if given(value):
                raise unread(key, f"a turn of {role!r} has")
        elif name in TRAINED and not (is_null(value) or value == TRAINED[name]):
            raise DataError(
                f"a turn of {role!r} has {printable(key)}: {printable(value, 20)}, but mmkd trains "
                "on every answer",
                hint="cut the record before this turn, or name the key in 'ignore' of its source "
                "to train on it",
                kind=f"a turn has {key}",
            )


def _with_own(
    turn: dict[str, Any], parts: list[dict[str, Any]], shown: list[Any]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The parts of a turn, with the images of its own `images` or `image`."""
    own = pictures_of(listed(turn, "drop one of them"))
    if not own:
        return parts, shown
    if not shown:
        return [*({"type": "image"} for _ in own), *parts], own
    if any(s is not None for s in shown) or len(shown) != len(own):
        raise DataError(
            f"a turn has {len(shown)} image placeholder(s) but {len(own)} image(s) of its own",
            hint="make the two numbers equal",
            kind="numbers of placeholders and images differ",
        )
    return parts, own


def _check_text(message: Message) -> None:
    text = "".join(part.get("text", "") for part in message["content"])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("text has half of a surrogate pair", hint="fix its encoding") from error
    named = NAMED_IN_TEXT.search(text) if message["role"] != "assistant" else None
    if named is not None:
        raise DataError(
            f"the text names a file: {printable(named.group(), 60)}",
            hint="write <image> instead, and the path under 'images'",
            kind="the text names an image, sound or video",
        )


def _part(said: Any) -> list[tuple[dict[str, Any], Any]]:
    """The parts that one item of a content list becomes, each with the image that it shows.

    An item whose text is None becomes no part.
    """
    kind = said.get("type") if isinstance(said, dict) else None
    if isinstance(said, dict) and kind is None:  # {"image": "a.png"}, {"text": "What is this?"}
        kind = next((k for k in ("text", *PICTURE_KEYS) if given(said.get(k))), None)
        kind = kind if kind in (None, "text") else "image"
    if kind not in TEXT_TYPES + IMAGE_TYPES:
        raise DataError(
            f"unknown content type {printable(kind, 40)!r}",
            hint="text or image",
            kind="unknown content type",
        )
    known = PART_KEYS if kind in TEXT_TYPES else PART_KEYS.union(PICTURE_KEYS)
    for key in said:
        if key not in known and given(said[key]):
            raise DataError(
                f"unknown content key {printable(key, 40)!r} of type {kind}",
                hint="drop it; the recipe's image_size sets the size of images",
                kind="unknown content key",
            )
    if kind in IMAGE_TYPES:
        return [({"type": "image"}, _shown(said))]
    text = said.get("text")
    if text is None:
        return []
    if not isinstance(text, str):
        raise DataError("a part of type 'text' has no text", hint="give it a text")
    if PLACEHOLDER in text:
        return [(part, None) for part in _split_placeholders(text)]
    return [({"type": "text", "text": text}, None)]


def _shown(part: dict[str, Any]) -> Any:
    """The image of a part of type image, or its `Index`, or None for the record's next image."""
    found = {key: part[key] for key in PICTURE_KEYS if given(part.get(key))}
    whole = isinstance(found.get("bytes"), bytes)
    path = found.pop("path", None) if whole else None  # a name for messages
    if len(found) > 1:
        raise DataError(
            "a part of type 'image' names several images", hint="give each a part of its own"
        )
    if whole:
        return {"bytes": found["bytes"], "path": path}
    if found:
        ((key, value),) = found.items()
        return picture_of({"base64": value} if key == "base64" else value)
    index = part.get("index")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int):
        raise DataError(
            f"the index of an image is {printable(index, 40)!r}", hint="count images from 0"
        )
    return Index(index)


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    """Split a text at LLaVA's '<image>' placeholders, which are on lines of their own."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece.removesuffix("\n") if i == 0 else piece})
    return parts or [{"type": "text", "text": text}]
