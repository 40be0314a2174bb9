"""Samples: rendered records with their images, ready to be encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from mmkd.cache import record_key
from mmkd.data.chat import Rendered
from mmkd.data.schema import Message, Record
from mmkd.data.templates import render

BLANK_SIZE = (64, 64)
NO_INDEX = -1
"""Index of a sample that is not a record of the data."""


def key_of(record: Record, pictures: Sequence[Image.Image]) -> bytes:
    """The key of a record with its decoded images."""
    messages: list[Any] = record.messages
    if record.unfinished:
        messages = [*messages, "unfinished"]
    return record_key(messages, pictures)


@dataclass(frozen=True)
class Sample:
    """A record with its text and images; for a preference pair, with one of its two answers."""

    index: int
    record: Record
    rendered: Rendered
    pictures: list[Image.Image]
    rejected: Rendered | None = None

    @property
    def key(self) -> bytes:
        """Its key in a cache."""
        return key_of(self.record, self.pictures)

    def other(self) -> "Sample":
        """The rejected answer as a sample."""
        assert self.rejected is not None
        return replace(self, rendered=self.rejected, rejected=None)


def blank_sample(processor: Any) -> Sample:
    """A question about a blank image."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    messages: list[Message] = [{"role": "user", "content": content}]
    text = render(processor, messages, prompt=True)
    picture = Image.new("RGB", BLANK_SIZE)
    return Sample(NO_INDEX, Record("filler", messages), Rendered(text, (), ()), [picture])
