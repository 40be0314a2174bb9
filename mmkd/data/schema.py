"""Parse rows of data files, in any of the supported schemas, into records.

The schemas are these; the last three are for preference pairs:

    LLaVA           {id, image | images, conversations: [{from: human|gpt|system, value}]}
    chat messages   {id?, images?, messages: [{role, content}]}
    Cauldron        {images, texts: [{user, assistant}]}
    LLaVA pairs     {id, image | images, chosen: [turns], rejected: [turns]}, both with the prompt
    TRL pairs       {images?, prompt: [messages] | str, chosen: [messages] | str, rejected: ...}
    RLAIF-V         {image, question: str, chosen: str, rejected: str}

`image` may be a list too. Metadata is ignored. Keys with content that mmkd does not read are
refused: see `mmkd.data.unread`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data.content import first_of, listed, printable, resolved
from mmkd.data.turns import (
    Conversation,
    Message,
    Turns,
    parse_conversation,
    parse_turns,
    role_of,
)
from mmkd.data.unread import ONE_OF_THEM, refuse_unread
from mmkd.errors import DataError

PROMPTS = ("prompt", "question", "conversations", "messages")
"""Keys of the prompt of a preference pair, if the answers do not repeat it."""
ANSWERS = ("conversations", "messages", "texts", "chosen")


@dataclass(frozen=True)
class GroundedObject:
    """An object in an image: its name, and its box (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """A conversation with its images, in the order of their placeholders. For a preference pair,
    the chosen and the rejected conversation.

    Attributes:
        messages: without an answer of the assistant, only objectives can use it that need none.
        images: paths below `root`, {bytes, path} pairs, members of an archive, or decoded images.
        last_answer_only: earlier answers belong to the prompt.
        unfinished: the last answer was cut off, so it has no end of turn.
        root: folder to which image paths are restricted; None if there is none.
    """

    id: str
    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    objects: tuple[GroundedObject, ...] = ()
    rejected: list[Message] | None = None
    last_answer_only: bool = False
    unfinished: bool = False
    root: Path | None = None

    @property
    def has_answer(self) -> bool:
        return any(m["role"] == "assistant" for m in self.messages)


def parse_record(row: dict[str, Any], index: int, root: Path | None = None) -> Record:
    """Parse a row in any of the schemas.

    Args:
        row: of a data file.
        index: of the row; its id if the row has none.
        root: folder of its image paths.

    Raises:
        DataError: the row is bad. The caller adds the place.
    """
    try:
        return _parsed(row, index, root)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of values that no schema has
        raise unparsed(error) from error


def unparsed(error: Exception) -> DataError:
    """The error for a row with unexpected values."""
    deep = isinstance(error, RecursionError)
    reason = "it is nested too deeply" if deep else f"{type(error).__name__}: {printable(error)}"
    return DataError(
        f"the record cannot be read ({reason})",
        hint="repair or drop it",
        kind="record not readable",
    )


def _parsed(row: dict[str, Any], index: int, root: Path | None) -> Record:
    refuse_unread(row)
    images = listed(row, ONE_OF_THEM)
    rejected = None
    if row.get("chosen") and row.get("rejected"):
        messages, pictures, rejected = _preference(row, images)
    else:
        found = parse_conversation(_turns_of(row))
        messages, pictures = found.messages, resolved(found.shown, images)
        _check_answered(messages, needed=False)
    # LLaVA's conversations always have image placeholders.
    free = not row.get("conversations")
    for conversation in (messages, rejected):
        if conversation is not None:
            _place_images(conversation, len(pictures), free)
    return Record(
        printable(record_id(row)) or str(index),
        messages,
        pictures,
        _objects(row.get("objects") or []),
        rejected,
        rejected is not None,
        _is_unfinished(row, messages, rejected is not None),
        root,
    )


def _is_unfinished(row: dict[str, Any], messages: list[Message], pair: bool) -> bool:
    said = row.get("unfinished")
    if said is not None and not isinstance(said, bool):
        raise DataError(f"'unfinished' is {printable(said, 40)!r}", hint="true or false")
    if said and (pair or messages[-1]["role"] != "assistant"):
        raise DataError(
            "'unfinished' is for records that end with one answer", hint="drop the record"
        )
    return bool(said)


def record_id(row: dict[str, Any]) -> str:
    """The id of a row; "" if it has none that is a text or a number."""
    try:
        return str(next((row[k] for k in ("id", "idx") if row.get(k) is not None), ""))
    except (ValueError, RecursionError):  # thousands of digits, lists in lists in lists
        return ""


def _turns_of(row: dict[str, Any]) -> Turns:
    """The turns of a row other than a preference pair."""
    if row.get("conversations"):
        return _from_first_question(parse_turns(row["conversations"]))
    if row.get("messages"):
        return parse_turns(row["messages"])
    if row.get("texts"):
        return [
            {"role": role, "content": said.get(role)}
            for said in parse_turns(row["texts"])
            for role in ("user", "assistant")
        ]
    raise DataError(
        "neither 'conversations' nor 'messages', nor 'chosen' with 'rejected'",
        hint="use one of the schemas",
    )


def _from_first_question(turns: Turns) -> Turns:
    """Drop answers before the first question. Excerpts of longer conversations begin with one, and
    LLaVA's code drops it too."""
    asked = next((i for i, t in enumerate(turns) if role_of(t) not in ("gpt", "assistant")), None)
    return [] if asked is None else turns[asked:]


def _preference(row: dict[str, Any], images: Any) -> tuple[list[Message], list[Any], list[Message]]:
    """The chosen conversation, its images, and the rejected conversation."""
    chosen, rejected = (parse_conversation(turns) for turns in _pair(row))
    for conversation in (chosen, rejected):
        _check_answered(conversation.messages, needed=True)
    pictures, others = (_pictures(c, images) for c in (chosen, rejected))
    if chosen.messages[:-1] != rejected.messages[:-1] or pictures != others:
        raise DataError(
            "chosen and rejected have different prompts", hint="repeat the prompt in both"
        )
    if chosen.messages == rejected.messages:
        raise DataError("chosen and rejected are the same", hint="drop the record")
    return chosen.messages, pictures, rejected.messages


def _pictures(conversation: Conversation, images: Any) -> list[Any]:
    return resolved(conversation.shown, images)


def _pair(row: dict[str, Any]) -> tuple[Turns, Turns]:
    """The turns of the chosen and of the rejected conversation."""
    asked = first_of({k: row.get(k) or None for k in PROMPTS}, *PROMPTS)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    elif isinstance(asked, dict):
        asked = [{"role": "user", **asked}]
    prompt = parse_turns(asked or [])
    ends = bool(prompt) and role_of(prompt[-1]) in ("gpt", "assistant")

    def whole(answer: Any) -> Turns:
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        turns = parse_turns([answer] if isinstance(answer, dict) else answer)
        if turns and role_of(turns[0]) not in ("gpt", "assistant"):
            return turns
        if ends:
            raise DataError(
                "the prompt of a preference pair ends with an answer", hint="leave that answer out"
            )
        return [*prompt, *turns]

    return whole(row["chosen"]), whole(row["rejected"])


def no_response() -> DataError:
    """The error for a record without an answer, if answers are needed."""
    return DataError("no response of the assistant", hint="add one or drop the record")


def _check_answered(messages: list[Message], *, needed: bool) -> None:
    """Check that answers have text, and that there is a question.

    Args:
        messages: of a conversation.
        needed: it must have an answer. Otherwise objectives decide that later.
    """
    answers = [m for m in messages if m["role"] == "assistant"]
    silent = not any(text_of(m).strip() for m in answers)
    if silent and (needed or answers or not messages):
        raise no_response()
    if messages[0]["role"] == "assistant":
        raise DataError("the conversation begins with an answer", hint="add what it answers")


def _place_images(messages: list[Message], images: int, free: bool) -> None:
    """Check that each image has a placeholder. If there is none and `free` is set, placeholders are
    added before the first question."""
    placeholders = sum(p["type"] == "image" for m in messages for p in m["content"])
    if placeholders == 0 and images and free:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise DataError("images but no turn of the user", hint="add the prompt")
        first["content"] = [{"type": "image"} for _ in range(images)] + first["content"]
    elif placeholders != images:
        raise DataError(
            f"{placeholders} image placeholder(s) but {images} image(s)",
            hint="make the two numbers equal",
            kind="numbers of placeholders and images differ",
        )


def _objects(said: Any) -> tuple[GroundedObject, ...]:
    return tuple(map(_object, said if isinstance(said, list) else [said]))


def _object(said: Any) -> GroundedObject:
    try:
        name, (left, top, right, bottom) = said["name"], map(float, said["box"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DataError(
            "an object has no name or no box of four numbers", hint="give {name, box}"
        ) from error
    box = (left, top, right, bottom)
    ordered = left <= right and top <= bottom
    if not isinstance(name, str) or not ordered or not all(map(math.isfinite, box)):
        raise DataError(
            f"{printable(name, 40)!r} has the box {box}",
            hint="give left, top, right, bottom in pixels",
            kind="an object's box is not valid",
        )
    return GroundedObject(name, box)


def text_of(message: Message) -> str:
    """The text of a message, without images."""
    return "".join(part.get("text", "") for part in message["content"])
