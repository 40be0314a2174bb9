"""Calls of a server's API: time limits, bounds, retries and messages of errors."""

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, NamedTuple, TypeVar

import httpx2

from mmkd.errors import AGAIN, HINT, ServerError, one_row
from mmkd.making.chat_format import AnswerFormatError, Completion, completion_of
from mmkd.making.threads import CancelledError
from mmkd.recipe.servers import ServerConfig
from mmkd.runtime.formats import FormatError, parse_json

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first retry, doubled after each, and the most seconds."""
LONGEST_RETRY_AFTER = 3600.0
"""The most seconds that a server may ask to wait."""
CONNECT_S = 15.0
"""Seconds for a connection."""
MOST_BYTES = 2**24
"""Largest body of an answer."""
PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same request may succeed."""
_SHOWN = 300  # characters of a server's message
_JSON = "application/json"


class TemporaryError(Exception):
    """A failure that may not come again if the request is repeated.

    Args:
        what: what has failed.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class Reply(NamedTuple):
    """An HTTP answer: its status, reason phrase, headers and body."""

    status: int
    phrase: str
    headers: httpx2.Headers
    body: bytes

    @property
    def kind(self) -> str:
        """Its content type, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class Calls:
    """Calls of one server, from several threads at once.

    Redirects are not followed, so that the API key is sent to no other host.

    Args:
        config: of the server.
        key: the API key, or None.
    """

    def __init__(self, config: ServerConfig, key: str | None):
        self.config, self._key = config, key
        self.url = config.server.rstrip("/")
        # Compressed bodies could be larger than MOST_BYTES before they are counted.
        headers = {"Accept": _JSON, "Accept-Encoding": "identity", "User-Agent": "mmkd"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(config.timeout_s, connect=min(CONNECT_S, config.timeout_s)),
            limits=httpx2.Limits(max_connections=config.concurrency + 1),
        )
        self._random = random.Random()  # the global one belongs to the caller
        self._not_before = 0.0

    def close(self) -> None:
        self._client.close()

    def send(self, method: str, path: str, content: bytes | None = None, what: str = "") -> Reply:
        """Send one request.

        Args:
            method, path, content: of the HTTP request.
            what: names the request in errors.

        Raises:
            TemporaryError: no answer came, or a status after which one may come.
            ServerError: the answer is a redirect, or too large.
        """
        url, until = self.url + path, time.monotonic() + self.config.timeout_s
        place = f"{url}: {what}" if what else url
        headers = {} if content is None else {"Content-Type": _JSON}
        try:
            with self._client.stream(method, url, content=content, headers=headers) as answer:
                body = bytearray()
                for piece in answer.iter_bytes():
                    body += piece
                    if len(body) > MOST_BYTES:
                        large = f"its answer has more than {MOST_BYTES // 2**20} MiB"
                        raise ServerError(large, where=place, hint="lower max_new_tokens")
                    if time.monotonic() > until:
                        raise httpx2.ReadTimeout("")
        except httpx2.ConnectTimeout as error:
            seconds = min(CONNECT_S, self.config.timeout_s)
            raise TemporaryError(f"no connection within {seconds:g} s") from error
        except httpx2.TimeoutException as error:
            raise TemporaryError(f"no answer within {self.config.timeout_s:g} s") from error
        except httpx2.RequestError as error:
            raise TemporaryError(self.line(str(error)) or type(error).__name__) from error
        reply = Reply(answer.status_code, answer.reason_phrase, answer.headers, bytes(body))
        if 300 <= reply.status < 400:
            target = self.line(reply.headers.get("location", ""))
            raise ServerError(
                f"it redirects to {target or 'nowhere'}, which is not followed",
                where=place,
                hint="if you trust that address, give it as 'server'",
            )
        if reply.status in PASSING:
            wait = _retry_after(reply.headers.get("retry-after"))
            more = f", and it asks to wait {wait:,.0f} s" if wait else ""
            raise TemporaryError(self._said(reply) + more, wait)
        return reply

    def chat(self, content: bytes, what: str) -> Completion:
        """Ask the model once.

        Args:
            content: the request's body, `chat_format.request_body`.
            what: names the request in errors.

        Raises:
            TemporaryError: as in `send`, or the answer is no chat completion.
            ServerError: the server refuses the request.
        """
        path = "/chat/completions"
        reply = self.send("POST", path, content, what)
        if reply.status >= 400:
            raise self.refusal(f"{path}: {what}", reply)
        found = self.json(reply)
        try:
            return completion_of(found)
        except AnswerFormatError as error:
            # Routers send errors of the servers that they ask with status 200.
            failed = isinstance(found, dict) and bool(found.get("error"))
            more = f": {message_in(found)}" if failed else ""
            raise TemporaryError(self.line(f"{error}{more}")) from error

    def json(self, reply: Reply) -> Any:
        """The parsed body of an answer.

        Raises:
            TemporaryError: the body is no JSON.
        """
        try:
            return parse_json(reply.body)
        except FormatError as error:
            kind = f" of type {self.line(reply.kind)}" if reply.kind != _JSON else ""
            raise TemporaryError(f"an answer{kind} that is no JSON ({error})") from error

    def retried(
        self,
        call: Callable[[], T],
        what: str,
        *,
        retries: int,
        stop: Event,
        note: Callable[[str], None],
    ) -> T:
        """The result of a call that is repeated after a temporary error.

        Waits grow exponentially and are random, so that requests that failed together are not
        repeated together. If the server asks to wait, all threads do.

        Args:
            call: raises `TemporaryError`, or another error, which is not repeated.
            what: names the request in the error.
            retries: how often the call is repeated.
            stop: set if no further request is wanted.
            note: gets the text of each temporary error.

        Raises:
            ServerError: the last call failed too, or `call` raised it.
            CancelledError: `stop` was set before the call could be made.
        """
        for tried in range(retries + 1):
            self._wait(stop)
            try:
                return call()
            except TemporaryError as error:
                if error.wait > LONGEST_RETRY_AFTER:
                    raise ServerError(
                        str(error),
                        where=f"{self.url}: {what}",
                        hint=f"later, {AGAIN}",
                    ) from error
                if tried == retries:
                    raise ServerError(
                        f"no answer after {retries + 1} tries, the last one: {error}",
                        where=f"{self.url}: {what}",
                        hint=f"check the server; {AGAIN}",
                    ) from error
                note(str(error))
                self._not_before = max(self._not_before, time.monotonic() + error.wait)
                wait = min(FIRST_WAIT * 2**tried, LONGEST_WAIT) * self._random.uniform(0.5, 1.0)
                if stop.wait(max(wait, error.wait)):
                    raise CancelledError from error
        raise AssertionError("unreachable")

    def _wait(self, stop: Event) -> None:
        while not stop.is_set():
            wait = self._not_before - time.monotonic()
            if wait <= 0:
                return
            stop.wait(wait)
        raise CancelledError

    def refusal(self, place: str, reply: Reply) -> ServerError:
        """The error for an answer with a status after which retries are useless."""
        return ServerError(self._said(reply), where=self.url + place, hint=self._hint(reply))

    def _said(self, reply: Reply) -> str:
        """The status of an answer, with the server's message."""
        message = self.line(_message(reply))
        status = f"{reply.status} {self.line(reply.phrase)}".strip()
        return f"status {status}: {message}" if message else f"status {status}"

    def _hint(self, reply: Reply) -> str:
        if reply.status in (401, 403):
            name = self.config.key
            if name is None:
                return "give 'key' the name of the environment variable that holds the API key"
            return f"check the API key in the environment variable {name}"
        if reply.status in (404, 405):
            return "check 'server', which often ends with /v1, and 'model'"
        if reply.status == 413:
            return "send smaller images, or set image_format: jpeg"
        return "change what it names in 'extra', the sampling settings or the questions"

    def line(self, text: str) -> str:
        """Text of a server, in one line and without the API key."""
        if self._key:
            text = text.replace(self._key, "...")
        text = " ".join(text[: 10 * _SHOWN].split())
        return one_row(text).replace(HINT, " - ")[:_SHOWN]


def _message(reply: Reply) -> str:
    """What a server says of an error, in JSON or in plain text."""
    try:
        return message_in(parse_json(reply.body))
    except FormatError:
        return reply.body.decode(errors="replace") if reply.kind == "text/plain" else ""


def message_in(found: Any) -> str:
    """The message in the JSON of an error, as OpenAI, vLLM, llama.cpp and FastAPI write it."""
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else str(found)


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 without one."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return seconds if 0 < seconds < float("inf") else 0.0
