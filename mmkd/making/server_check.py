"""Checks of a server before the first request: is it one, has it the model, does it take images?

A server of a text model may pass over images without a word. Its answers cannot prove that it has
looked at them, but two facts are evidence that it has:

- The same question has more prompt tokens with an image than without one. vLLM and
  `transformers serve` count the tokens of images.
- The answers about a red and a blue image differ, at temperature 0.

A server that counts equal tokens and gives equal answers is refused. One that counts no tokens and
gives equal answers is used, and the message says that this is not known.
"""

from collections.abc import Callable
from threading import Event
from typing import TypeVar

from PIL import Image

from mmkd.errors import ServerError, nearest
from mmkd.making.base import Request
from mmkd.making.chat_format import Completion, request_body
from mmkd.making.server_calls import Calls, TemporaryError
from mmkd.recipe import SamplingConfig

T = TypeVar("T")

RETRIES = 2
"""Most retries of a check: a wrong address should not take a minute to be found."""
_SIZE = (224, 224)  # families with large patches refuse smaller images
_RED, _BLUE = (220, 30, 30), (30, 60, 220)
_QUESTION = "Which colour does this image have?"
_OPEN = "What do you see?"
_TOKENS = 24
_SEEDS, _HOT = 3, 1.0  # seeds to compare, and the lowest temperature to do so
_NAMES = 20  # of a server's models in a message


class ServerCheck:
    """Checks of one server.

    Args:
        calls: of the server.
        note: gets the text of each temporary error after which a check is repeated.
    """

    def __init__(self, calls: Calls, note: Callable[[str], None]):
        self._calls, self._note = calls, note
        self._config = calls.config
        self._retries = min(RETRIES, self._config.retries)

    def models(self) -> None:
        """Check that the server lists the model. Servers without a list pass.

        Raises:
            ServerError: it does not list the model, cannot be reached, or is no server of an API.
        """
        url = f"{self._calls.url}/models"
        reply = self._retried(lambda: self._calls.send("GET", "/models"), "the list of its models")
        if reply.status in (401, 403):
            raise self._calls.refusal("/models", reply)
        if reply.status != 200:
            return
        try:
            found = self._calls.json(reply)
        except TemporaryError as error:
            raise ServerError(
                f"it is no server of an API: {error}",
                where=url,
                hint="check 'server', which often ends with /v1",
            ) from error
        rows = found.get("data") if isinstance(found, dict) else None
        rows = rows if isinstance(rows, list) else []
        names = [row.get("id") for row in rows if isinstance(row, dict)]
        known = [name for name in names if isinstance(name, str)]
        if known and self._config.model not in known:
            close = nearest(self._config.model, known)
            if not close.endswith("?"):
                more = [f"and {len(known) - _NAMES} more"] if len(known) > _NAMES else []
                close = f"it has: {', '.join([*known[:_NAMES], *more])}"
            what = f"it has no model '{self._config.model}'"
            raise ServerError(what, where=url, hint=self._calls.line(close))

    def vision(self) -> str:
        """Check that the model takes images, with two or three short questions.

        Returns:
            What was found, in one line.

        Raises:
            ServerError: the model refuses an image, or does not look at it.
        """
        model = f"{self._calls.url}: {self._config.model}"
        try:
            red = self._ask(_RED)
        except ServerError as error:
            if self._asked_without() is None:
                raise
            raise ServerError(
                f"it answers questions, but not with an image: {error.what}",
                where=model,
                hint="serve a vision-language model, with its vision part",
            ) from error
        without = self._asked_without()
        shown, alone = red.prompt_tokens, without.prompt_tokens if without else None
        counts = f"a question has {shown} tokens with an image and {alone} without"
        if shown is not None and alone is not None and shown > alone:
            return f"{model} takes images: {counts}"
        if self._ask(_BLUE).answer != red.answer:
            return f"{model} takes images: its answers about a red and a blue one differ"
        if None not in (shown, alone):
            raise ServerError(
                f"it passes over images: {counts}, and its answers about a red and a blue one are "
                "equal",
                where=model,
                hint="serve a vision-language model, with its vision part",
            )
        return (
            f"{model}: it is not known whether it looks at images; the server does not count "
            "tokens, and its answers about a red and a blue image are equal"
        )

    def sampling(self, temperature: float, *, images: bool) -> str | None:
        """Check that answers depend on the seed. `transformers serve`, for one, decodes greedily at
        every temperature, unless `do_sample` is set in the model's generation settings.

        Args:
            temperature: at which answers will be sampled.
            images: ask about an image, which some models require.

        Returns:
            A warning in one line, or None.
        """
        temperature = max(temperature, _HOT)
        colour = _RED if images else None
        answers = [self._ask(colour, temperature, seed).answer for seed in range(_SEEDS)]
        if any(answer != answers[0] for answer in answers):
            return None
        return (
            f"{self._calls.url}: {self._config.model} gives equal answers to {_SEEDS} seeds at "
            f"temperature {temperature:g}; the server may ignore the sampling settings"
        )

    def _asked_without(self) -> Completion | None:
        """The question without an image; None if the server refuses it."""
        try:
            return self._ask(None)
        except ServerError:
            return None

    def _ask(
        self, colour: tuple[int, int, int] | None, temperature: float = 0, seed: int = 0
    ) -> Completion:
        """Ask about an image of one colour, or a question without an image."""
        images = [] if colour is None else [Image.new("RGB", _SIZE, colour)]
        content = [
            *({"type": "image"} for _ in images),
            {"type": "text", "text": _QUESTION if temperature == 0 else _OPEN},
        ]
        request = Request("check", [{"role": "user", "content": content}], lambda: images, seed)
        sampling = SamplingConfig(max_new_tokens=_TOKENS, temperature=temperature)
        body = request_body(request, self._config, sampling)
        what = f"a question {'with' if images else 'without'} an image"
        return self._retried(lambda: self._calls.chat(body, what), what)

    def _retried(self, call: Callable[[], T], what: str) -> T:
        return self._calls.retried(call, what, retries=self._retries, stop=Event(), note=self._note)
