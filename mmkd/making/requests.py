"""Turn questions into requests: the context that only the maker sees, keys and seeds."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmkd.cache.keys import picture_hash
from mmkd.data.images import image_content
from mmkd.data.records import Records
from mmkd.data.turns import Message
from mmkd.making.base import Request
from mmkd.making.questions import Question
from mmkd.recipe import DataConfig, MakeConfig, SamplingConfig

KEY_BYTES = 16
MOST_SEED = 2**31


@dataclass(frozen=True)
class Context:
    """Messages that the maker reads before a question.

    Attributes:
        messages: a system message and examples.
        references: of the images of the examples, as in `Question`.
    """

    messages: tuple[Message, ...] = ()
    references: tuple[tuple[Any, Path | None], ...] = ()

    @classmethod
    def of(cls, config: MakeConfig) -> "Context":
        """The context of an entry of `make`.

        Raises:
            DataError: the examples cannot be read.
        """
        if config.context is None:
            return cls()
        messages: list[Message] = []
        references: list[tuple[Any, Path | None]] = []
        if config.context.system is not None:
            text = {"type": "text", "text": config.context.system}
            messages.append({"role": "system", "content": [text]})
        if config.context.shots is not None:
            records = Records(DataConfig(train=config.context.shots))
            for record in (records[index] for index in range(len(records))):
                messages += [m for m in record.messages if m["role"] != "system"]
                references += [(image, record.root) for image in record.images]
        return cls(tuple(messages), tuple(references))

    def before(self, question: Question) -> Question:
        """A question with this context before it. Its own system message is replaced."""
        if not self.messages:
            return question
        own = question.messages
        if self.messages[0]["role"] == "system":
            own = [m for m in own if m["role"] != "system"]
        return replace(
            question,
            messages=[*self.messages, *own],
            references=[*self.references, *question.references],
        )


def request_of(
    question: Question,
    revision: str,
    sampling: SamplingConfig,
    seed: int,
    candidate: int,
    again: Callable[[], Question],
) -> Request:
    """A request for one answer.

    Its key is a hash of messages, images, the model, the sampling parameters and, for sampled
    answers, the seed and the number of the candidate. Files of images are hashed as they are on
    disk, so that they need not be decoded.

    Args:
        question: with its context.
        revision: of the model.
        sampling: how answers are sampled.
        seed: of the entry of `make`.
        candidate: number of the answer to this question.
        again: reads the question, for its images, when the request is sent. The request does not
            hold them, because those of all requests may not fit into memory.

    Raises:
        DataError: an image cannot be found.
    """
    settings = sampling.model_dump(mode="json", exclude={"n"})
    drawn = None if sampling.temperature == 0 else [seed, candidate]
    words = json.dumps([question.messages, revision, settings, drawn], sort_keys=True)
    seen = hashlib.blake2b(words.encode(), digest_size=KEY_BYTES)
    for reference in question.references:
        seen.update(image_digest(*reference))
    key = seen.hexdigest()
    return Request(key, question.messages, lambda: again().images(), int(key[:12], 16) % MOST_SEED)


def image_digest(reference: Any, root: Path | None) -> bytes:
    """A hash of an image's file as it is on disk; of a decoded image, of its pixels.

    Raises:
        DataError: it cannot be found.
    """
    content = image_content(reference, root)
    if content is None:
        return picture_hash(reference)
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
