"""What a maker is asked, what it answers, and its interface.

A maker is a model that writes answers: one in this process, or one on a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mmkd.recipe import ModelConfig, SamplingConfig, ServerConfig

MakerSource = ModelConfig | ServerConfig
"""Settings of a model that answers."""


@dataclass(frozen=True)
class Request:
    """A conversation that ends before an answer.

    Attributes:
        key: hex digest of everything that the answer depends on.
        messages: chat messages. Their contents are lists of {"type": "text", "text": ...} and
            {"type": "image"}.
        images: reads the images when the request is sent, in the order of the image parts. Any
            thread may call it.
        seed: of the answer's random numbers, 0 <= seed < 2**31; a function of the key.
    """

    key: str
    messages: list[dict[str, Any]]
    images: Callable[[], list[Image.Image]]
    seed: int


@dataclass(frozen=True)
class Answer:
    """An answer to a request.

    Attributes:
        text: without end tokens.
        finished: the model ended it; False if it was cut, by `max_new_tokens` or by a filter of
            the server.
        error: why the question could not be asked, such as an image that cannot be read. Then
            there is no text.
    """

    text: str
    finished: bool
    error: str | None = None


class Maker(Protocol):
    """A model that answers requests.

    Attributes:
        name: what messages and provenance call it.
        source: settings of the model.
        weights: identifies the model's weights: a hash of them, or a server and an id.
        revision: the weights, with all settings of the model that change its answers.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> MakerSource: ...

    @property
    def weights(self) -> str: ...

    @property
    def revision(self) -> str: ...

    def answer(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        keep: Callable[[Request, Answer], None],
    ) -> None:
        """Answer requests. If it returns, all are answered.

        Args:
            requests: in any order.
            sampling: how answers are sampled.
            keep: called from this thread with each answer as soon as it is there, in any order.

        Raises:
            MmkdError: a request cannot be answered. Earlier answers were passed to `keep`.
            StoppedError: the process was asked to stop. No further request is started.
        """
        ...

    def release(self) -> None:
        """Free what the model takes of this machine's memory, until it is asked again."""
        ...
