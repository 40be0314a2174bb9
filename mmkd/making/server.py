"""A model on a server that speaks OpenAI's chat completions protocol, such as vLLM, SGLang,
llama.cpp or `transformers serve`.

A server may compute in another dtype than a model in this process (`transformers serve` takes the
checkpoint's), and in batches. So where probabilities are almost equal, even greedy answers may
differ.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from queue import SimpleQueue
from threading import Event

import httpx2

from mmkd.errors import DataError, ServerError
from mmkd.making.base import Answer, Request
from mmkd.making.chat_format import request_body
from mmkd.making.server_calls import Calls
from mmkd.making.server_check import ServerCheck
from mmkd.making.threads import in_threads
from mmkd.recipe import SamplingConfig
from mmkd.recipe.servers import ServerConfig
from mmkd.runtime.progress import say

SECONDS_BETWEEN_NOTES = 30.0
"""Seconds between two messages about temporary errors."""
_KEY_SHOWN = 12  # characters of a request's key in messages


class ServerMaker:
    """A `Maker` that asks a server.

    Requests are sent from `concurrency` threads. Temporary errors (time-outs, lost
    connections, `server_calls.PASSING` statuses, and answers that are no chat completions) are
    followed by retries with growing waits. Other errors of the server stop `answer`.

    Args:
        config: of the server.

    Raises:
        ServerError: the environment variable of the API key is not set, or the address is none.
    """

    def __init__(self, config: ServerConfig):
        self.config = config
        self._key = _api_key(config)
        self._checked: set[str] = set()
        try:
            httpx2.URL(config.server)
        except httpx2.InvalidURL as error:
            raise ServerError(f"it is no address ({error})", where=config.server) from error

    @property
    def name(self) -> str:
        return f"{self.config.model} at {self.config.server}"

    @property
    def source(self) -> ServerConfig:
        return self.config

    @property
    def weights(self) -> str:
        return f"{self.config.server.rstrip('/')} {self.config.model}"

    @property
    def revision(self) -> str:
        """Server and model, with a hash of other settings that change answers. What the server
        holds under the model's name is not known."""
        config = self.config
        text = self.weights
        if config.extra or config.image_format != "png":
            other = json.dumps([config.image_format, config.extra], sort_keys=True)
            text += f" {hashlib.blake2b(other.encode(), digest_size=8).hexdigest()}"
        return text

    def answer(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        keep: Callable[[Request, Answer], None],
    ) -> None:
        """Answer requests. If it returns, all are answered.

        The server is checked before the first request. `images` of requests are called from other
        threads, several at a time.

        Args:
            requests: in any order.
            sampling: how answers are sampled. `top_k` is sent only if it is not 0.
            keep: called from this thread with each answer as soon as it is there.

        Raises:
            ServerError: the server refuses a request, or a request has failed too often. Earlier
                answers were passed to `keep`.
            StoppedError: the process was asked to stop. No further request is started.
        """
        if not requests:
            return
        with closing(Calls(self.config, self._key)) as calls:
            self._check(calls, requests, sampling)
            errors = _TemporaryErrors(calls.url)
            stop = Event()

            def ask(request: Request) -> Answer:
                try:
                    body = request_body(request, self.config, sampling)
                except DataError as error:
                    return Answer("", False, str(error))
                what = f"request {request.key[:_KEY_SHOWN]}"
                completion = calls.retried(
                    lambda: calls.chat(body, what),
                    what,
                    retries=self.config.retries,
                    stop=stop,
                    note=errors.put,
                )
                return completion.answer

            in_threads(
                ask,
                requests,
                keep,
                threads=self.config.concurrency,
                stop=stop,
                tick=errors.report,
            )

    def release(self) -> None:
        """Nothing: the model takes no memory of this machine."""

    def _check(self, calls: Calls, requests: Sequence[Request], sampling: SamplingConfig) -> None:
        """The checks that these requests need and that have not been made."""
        check = ServerCheck(calls, lambda error: say(f"{calls.url}: {error}; trying again"))
        if "models" not in self._checked:
            check.models()
            self._checked.add("models")
        images = any(_has_images(request) for request in requests)
        if images and "vision" not in self._checked:
            say(check.vision())
            self._checked.add("vision")
        if sampling.temperature > 0 and "sampling" not in self._checked:
            if (doubt := check.sampling(sampling.temperature, images=images)) is not None:
                say(doubt)
            self._checked.add("sampling")


class _TemporaryErrors:
    """Counts temporary errors in all threads, and reports them from one."""

    def __init__(self, url: str):
        self._url = url
        self._new: SimpleQueue[str] = SimpleQueue()
        self._count, self._next = 0, 0.0

    def put(self, error: str) -> None:
        self._new.put(error)

    def report(self) -> None:
        """Log the latest error and the number of all, if the last message is long ago."""
        if self._new.empty() or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_NOTES
        last = ""
        while not self._new.empty():
            last = self._new.get()
            self._count += 1
        say(f"{self._url}: {last}; trying again ({self._count} such errors so far)")


def _has_images(request: Request) -> bool:
    return any(part["type"] == "image" for m in request.messages for part in m["content"])


def _api_key(config: ServerConfig) -> str | None:
    if config.key is None:
        return None
    key = os.environ.get(config.key, "").strip()
    if not key:
        raise ServerError(
            f"the environment variable {config.key} is not set",
            where=config.server,
            hint="set it to the API key of the server",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ServerError(
            f"the environment variable {config.key} holds no API key",
            where=config.server,
            hint="set it to a key of ASCII characters without spaces",
        )
    return key
