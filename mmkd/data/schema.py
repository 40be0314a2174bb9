"""What a row of a data file says, in one shape whatever its schema.

Two schemas are read and three of preference pairs:

    LLaVA           {id, image | images, conversations: [{from: human|gpt|system, value}]}
    chat messages   {id?, images?, messages: [{role, content}]}
    LLaVA pairs     {id, image | images, chosen: [turns], rejected: [turns]}, both with the prompt
    TRL pairs       {images?, prompt: [messages] | str, chosen: [messages] | str, rejected: ...}
    RLAIF-V         {image, question: str, chosen: str, rejected: str}

`image` may be a list too. Keys that are not named here are passed over.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
         "system": "system"}  # fmt: skip
PLACEHOLDER = "<image>"
ANSWERS = ("conversations", "messages", "chosen")

Message = dict[str, Any]
"""{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}]}"""


@dataclass(frozen=True)
class GroundedObject:
    """Something on the picture: its word and its box (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """One conversation with its pictures, in the order of their placeholders; of a preference pair
    the chosen one, and the one with the rejected answer.

    Attributes:
        images: paths below `root`, {bytes, path} pairs, members of an archive, or decoded pictures.
        last_answer_only: earlier answers belong to the prompt.
        root: the folder that image paths must not leave; None where there is none.
    """

    id: str
    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    objects: tuple[GroundedObject, ...] = ()
    rejected: list[Message] | None = None
    last_answer_only: bool = False
    root: Path | None = None


def parse_record(row: dict[str, Any], index: int, root: Path | None = None) -> Record:
    """One row in any of the schemas.

    Args:
        row: of a data file.
        index: its number, the id of a row without one.
        root: the folder of its image paths.

    Raises:
        DataError: what is wrong with the row; the caller adds where.
    """
    images = _images(row)
    rejected = None
    if row.get("chosen") and row.get("rejected"):
        messages, rejected = (_conversation(turns) for turns in _pair(row))
        if messages[:-1] != rejected[:-1]:
            raise DataError(
                "chosen and rejected answer different prompts", mend="repeat the prompt in both"
            )
        if messages == rejected:
            raise DataError("chosen and rejected are the same", mend="drop the record")
    elif row.get("conversations"):
        messages = _conversation(_from_first_question(_turns(row["conversations"])))
    elif row.get("messages"):
        messages = _conversation(_turns(row["messages"]))
    else:
        raise DataError(
            "neither 'conversations' nor 'messages', nor 'chosen' with 'rejected'",
            mend="use one of the schemas",
        )
    # LLaVA's conversations always say where their pictures go.
    free = not row.get("conversations")
    for conversation in (messages, rejected):
        if conversation is not None:
            _place_images(conversation, len(images), free)
    return Record(
        printable(record_id(row)) or str(index),
        messages,
        images,
        _objects(row.get("objects") or []),
        rejected,
        rejected is not None,
        root,
    )


def record_id(row: dict[str, Any]) -> str:
    """What a row calls itself; "" where it does not."""
    return str(next((row[k] for k in ("id", "idx") if row.get(k) is not None), ""))


def printable(value: Any, longest: int = 120) -> str:
    """Foreign text on one line of a message: no control characters, not endless."""
    text = str(value)[: longest + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else text[:longest] + "..."


Turns = list[tuple[Any, Any]]


def _turns(said: Any) -> Turns:
    """(role, content) of a list of turns in either schema."""
    if not isinstance(said, list) or not all(isinstance(t, dict) for t in said):
        raise DataError("a conversation is no list of turns", mend="give each turn a role and text")
    return [(_first(t, "role", "from"), _first(t, "content", "value")) for t in said]


def _first(turn: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that has one; tables write None for what a row lacks."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _from_first_question(turns: Turns) -> Turns:
    """Without the answers that nobody asked for: conversations cut out of longer ones begin with
    one, and LLaVA's own code leaves it out too."""
    asked = next((i for i, (role, _) in enumerate(turns) if role not in ("gpt", "assistant")), None)
    return [] if asked is None else turns[asked:]


def _pair(row: dict[str, Any]) -> tuple[Turns, Turns]:
    """The turns of the chosen and of the rejected conversation."""
    asked = row.get("prompt") or row.get("question") or []
    prompt: Turns = [("user", asked)] if isinstance(asked, str) else _turns(asked)

    def whole(answer: Any) -> Turns:
        if isinstance(answer, str):
            return [*prompt, ("assistant", answer)]
        turns = _turns(answer)
        alone = bool(turns) and turns[0][0] in ("gpt", "assistant")
        return [*prompt, *turns] if alone else turns

    return whole(row["chosen"]), whole(row["rejected"])


def _conversation(turns: Turns) -> list[Message]:
    messages = [_message(role, content) for role, content in turns]
    if not any(m["role"] == "assistant" and text_of(m).strip() for m in messages):
        raise DataError("no response of the assistant", mend="add one or drop the record")
    if messages[0]["role"] == "assistant":
        raise DataError("the conversation begins with an answer", mend="add what it answers")
    return messages


def _place_images(messages: list[Message], images: int, free: bool) -> None:
    """Check that every picture has its placeholder; where none is written and that is `free`, all
    stand before the first question."""
    placeholders = sum(p["type"] == "image" for m in messages for p in m["content"])
    if placeholders == 0 and images and free:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise DataError("images but no turn of the user", mend="add the prompt")
        first["content"] = [{"type": "image"} for _ in range(images)] + first["content"]
    elif placeholders != images:
        raise DataError(
            f"{placeholders} image placeholder(s) but {images} image(s)",
            mend="make the two numbers equal",
            kind="numbers of placeholders and images differ",
        )


def _images(row: dict[str, Any]) -> list[Any]:
    found = row.get("images") or row.get("image") or []
    return list(found) if isinstance(found, list) else [found]


def _objects(said: Any) -> tuple[GroundedObject, ...]:
    return tuple(map(_object, said if isinstance(said, list) else [said]))


def _object(said: Any) -> GroundedObject:
    try:
        name, (left, top, right, bottom) = said["name"], map(float, said["box"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DataError(
            "an object has no name or no box of four numbers", mend="give {name, box}"
        ) from error
    box = (left, top, right, bottom)
    ordered = left <= right and top <= bottom
    if not isinstance(name, str) or not ordered or not all(map(math.isfinite, box)):
        raise DataError(
            f"{printable(name, 40)!r} has the box {box}",
            mend="give left, top, right, bottom in pixels",
            kind="an object's box is none",
        )
    return GroundedObject(name, box)


def text_of(message: Message) -> str:
    """The words of a message."""
    return "".join(part.get("text", "") for part in message["content"])


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"unknown role {printable(role, 40)!r}",
            mend=f"known: {', '.join(ROLES)}",
            kind="unknown role",
        )
    if isinstance(content, str):
        parts = _split_placeholders(content)
    elif isinstance(content, list):
        parts = [_part(part) for part in content]
    else:
        raise DataError(
            f"a turn of {role!r} has no text", mend="give it a value", kind="a turn has no text"
        )
    message = {"role": ROLES[role], "content": parts}
    try:
        text_of(message).encode()
    except UnicodeEncodeError as error:
        raise DataError("text holds half of a character", mend="mend its encoding") from error
    return message


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise DataError(
        f"unknown content type {printable(kind, 40)!r}",
        mend="text or image",
        kind="unknown content type",
    )


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    """LLaVA writes pictures as '<image>' on a line of their own."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece.removesuffix("\n") if i == 0 else piece})
    return parts or [{"type": "text", "text": text}]
