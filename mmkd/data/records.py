"""Records: what a data file holds, in one shape whatever its schema.

Two schemas are read, from json, jsonl or parquet through `datasets`, and three of preference pairs:

    LLaVA           {id, image | images, conversations: [{from: human|gpt|system, value}]}
    chat messages   {id?, images?, messages: [{role, content}]}
    LLaVA pairs     {id, image | images, chosen: [turns], rejected: [turns]}, both with the prompt
    TRL pairs       {images?, prompt: [messages] | str, chosen: [messages] | str, rejected: ...}
    RLAIF-V         {image, question: str, chosen: str, rejected: str}

An image is a path below the image folder, a {bytes, path} pair, or a decoded picture.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.errors import DataError
from mmkd.recipe import DataConfig

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
         "system": "system"}  # fmt: skip
PLACEHOLDER = "<image>"
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

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
        last_answer_only: earlier answers belong to the prompt.
    """

    id: str
    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    objects: tuple[GroundedObject, ...] = ()
    rejected: list[Message] | None = None
    last_answer_only: bool = False


class Records:
    """A data file as a sequence of `Record`; errors name the file and the record."""

    def __init__(self, config: DataConfig):
        self.path = Path(config.train)
        self.image_root = Path(config.images) if config.images else self.path.parent
        if len(self) == 0:
            raise DataError("the data set is empty", where=str(self.path), mend="add records")

    @cached_property
    def _rows(self) -> Any:
        import datasets

        where = str(self.path)
        if not self.path.is_file():
            raise DataError("no such data file", where=where, mend="check data.train")
        loader = LOADERS.get(self.path.suffix)
        if loader is None:
            known = ", ".join(LOADERS)
            raise DataError("unknown kind of data file", where=where, mend=f"known: {known}")
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(loader, data_files=where, split="train")
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            if "corresponds to no data" in reason:
                raise DataError("the data set is empty", where=where, mend="add records") from error
            raise DataError(f"cannot read: {reason}", where=where, mend="mend the file") from error
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """Words for an error message: the file, the record's number and its id."""
        name = self._rows[index].get("id")
        return f"{self.path}: record {index}" + (f" (id {name})" if name is not None else "")

    def __getitem__(self, index: int) -> Record:
        with located(lambda: self.where(index)):
            return parse_record(self._rows[index], index)

    def sizes(self, record: Record) -> list[tuple[int, int]]:
        """Width and height of a record's pictures."""
        return [image_size(ref, self.image_root) for ref in record.images]

    def pictures(
        self, record: Record, load: Callable[[Any, Path], Image.Image] | None = None
    ) -> list[Image.Image]:
        """A record's pictures, decoded to RGB, or as `load` makes them of reference and root."""
        return [(load or load_image)(ref, self.image_root) for ref in record.images]


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Say where a data error happened, unless it says so itself."""
    try:
        yield
    except DataError as error:
        if error.where is not None:
            raise
        raise DataError(error.what, where=where(), mend=error.mend) from error


def parse_record(row: dict[str, Any], index: int) -> Record:
    """One row of a data file in any of the schemas.

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
        messages = _conversation([(t.get("from"), t.get("value")) for t in row["conversations"]])
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
    objects = tuple(GroundedObject(o["name"], tuple(o["box"])) for o in row.get("objects") or [])
    return Record(
        str(row.get("id", index)), messages, images, objects, rejected, rejected is not None
    )


Turns = list[tuple[Any, Any]]


def _turns(said: Any) -> Turns:
    """(role, content) of a list of turns in either schema."""
    return [(t.get("role") or t.get("from"), t.get("content") or t.get("value")) for t in said]


def _pair(row: dict[str, Any]) -> tuple[Turns, Turns]:
    """The turns of the chosen and of the rejected conversation."""
    asked = row.get("prompt") or row.get("question") or []
    prompt: Turns = [("user", asked)] if isinstance(asked, str) else _turns(asked)

    def whole(answer: Any) -> Turns:
        if isinstance(answer, str):
            return [*prompt, ("assistant", answer)]
        turns = _turns(answer)
        alone = bool(turns) and ROLES.get(turns[0][0]) == "assistant"
        return [*prompt, *turns] if alone else turns

    return whole(row["chosen"]), whole(row["rejected"])


def _conversation(turns: Turns) -> list[Message]:
    messages = [_message(role, content) for role, content in turns]
    if not any(m["role"] == "assistant" and _text(m).strip() for m in messages):
        raise DataError("no response of the assistant", mend="add one or drop the record")
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
        )


def _images(row: dict[str, Any]) -> list[Any]:
    if row.get("images"):
        return list(row["images"])
    return [row["image"]] if row.get("image") is not None else []


def _text(message: Message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def _message(role: Any, content: Any) -> Message:
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}", mend=f"known: {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": ROLES[role], "content": _split_placeholders(content)}
    if not isinstance(content, list):
        raise DataError(f"a turn of {role!r} has no text", mend="give it a value")
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "image":
            parts.append({"type": "image"})
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise DataError(f"unknown content type {part.get('type')!r}", mend="text or image")
    return {"role": ROLES[role], "content": parts}


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


def load_image(ref: Any, root: Path) -> Image.Image:
    """Decode one image reference to RGB.

    Raises:
        DataError: it is missing, outside of `root`, broken, or too large to be meant.
    """
    with _readable(ref):
        return _opened(ref, root).convert("RGB")


def image_size(ref: Any, root: Path) -> tuple[int, int]:
    """Width and height of an image reference, which is not decoded.

    Raises:
        DataError: as in `load_image`, but for what only decoding shows.
    """
    with _readable(ref):
        return _opened(ref, root).size


def _opened(ref: Any, root: Path) -> Image.Image:
    if isinstance(ref, Image.Image):
        return ref
    if isinstance(ref, dict) and ref.get("bytes") is not None:
        return Image.open(io.BytesIO(ref["bytes"]))
    path = ref.get("path") if isinstance(ref, dict) else ref
    if not isinstance(path, str) or not path:
        raise DataError("the image is missing", mend="give its path or bytes")
    return Image.open(_inside(root, path))


@contextmanager
def _readable(ref: Any) -> Iterator[None]:
    """Say what is wrong with an image."""
    path = ref.get("path") if isinstance(ref, dict) else ref
    name = path if isinstance(path, str) and path else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError as error:
        raise DataError(f"no such image: {name}", mend="check data.images") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is too large to decode", mend="shrink or drop it") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is not a readable image", mend="replace or drop it") from error


def _inside(root: Path, path: str) -> Path:
    target = (root / path).resolve()
    if not target.is_relative_to(root.resolve()):
        raise DataError(f"{path} lies outside of {root}", mend="keep images below data.images")
    return target
