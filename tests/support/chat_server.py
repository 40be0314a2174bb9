"""A server on this machine that speaks OpenAI's chat completions protocol. Its answers are a
function of the request, and it fails when told to."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "stub/model"
IMAGE_TOKENS = 64
CHECK = ("Which colour does this image have?", "What do you see?")
"""Questions of the checks before the first request."""


@dataclass
class Call:
    """A chat request: its body, headers, when it came, and how it failed (None: it did not)."""

    body: dict[str, Any]
    headers: dict[str, str]
    time: float
    fault: Any = None


@dataclass
class ChatServer:
    """The server's state, which a test sets and reads.

    Attributes:
        fault: the fault of a chat request, by its number from 0 (checks are not counted) and body:
            None; a status; (status, headers, body); or a name in `Handler.fail`.
        sees: answers depend on images.
        counts: "tokens" counts them with images, "text" without; None: no usage.
        samples: answers depend on the seed at temperatures above 0.
        models: ids of its list; None: it has no list.
        calls: chat requests that are no checks.
        checks: those that are.
    """

    fault: Callable[[int, dict[str, Any]], Any] = lambda number, body: None
    sees: bool = True
    counts: str | None = "tokens"
    samples: bool = True
    models: list[str] | None = field(default_factory=lambda: [MODEL])
    check_fault: Callable[[dict[str, Any]], Any] = lambda body: None
    list_fault: Any = None
    calls: list[Call] = field(default_factory=list)
    checks: list[Call] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    delay: float = 0.0
    url: str = ""

    def answered(self) -> list[dict[str, Any]]:
        return [call.body for call in self.calls if call.fault is None]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the model answers: the question, the images' mean colours and the seed."""
        parts = []
        for message in body["messages"]:
            content = message["content"]
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = [mean_colour(p["image_url"]["url"]) for p in parts if p["type"] == "image_url"]
        words = " ".join(p["text"] for p in parts if p["type"] == "text")
        shown = f" {images}" if self.sees else ""
        sampled = self.samples and body["temperature"] > 0
        text = words + shown + (f" seed {body['seed']}" if sampled else "")
        answer: dict[str, Any] = {
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                         "finish_reason": "stop"}],
        }  # fmt: skip
        if self.counts:
            count = len(words.split()) + IMAGE_TOKENS * len(images) * (self.counts == "tokens")
            answer["usage"] = {"prompt_tokens": count, "completion_tokens": len(text.split())}
        return answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ChatServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.state.paths.append(f"GET {self.path}")
        if self.state.list_fault is not None:
            self.fail(self.state.list_fault, {})
        elif self.path == "/v1/models" and self.state.models is not None:
            self.reply({"object": "list", "data": [{"id": name} for name in self.state.models]})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = Call(body, dict(self.headers), time.monotonic())
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        with state.lock:
            state.paths.append(f"POST {self.path}")
            if text in CHECK:
                state.checks.append(call)
                call.fault = state.check_fault(body)
            else:
                call.fault = state.fault(len(state.calls), body)
                state.calls.append(call)
        if state.delay:
            state.closing.wait(state.delay)
        if call.fault is None:
            self.reply(state.completion(body))
        else:
            self.fail(call.fault, body)

    def fail(self, fault: Any, body: dict[str, Any]) -> None:
        cut = json.dumps(self.state.completion(body)).encode()[:40] if body else b"{"
        if isinstance(fault, int):
            self.reply({"error": {"message": "on purpose", "code": fault}}, fault)
        elif isinstance(fault, tuple):
            status, headers, content = fault
            self.reply(content, status, **headers)
        elif fault == "hang":
            self.state.closing.wait(30)
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "half":
            self.start(200, 10_000)
            self.wfile.write(cut)
            self.close_connection = True
        elif fault == "drip":
            self.start(200, 10_000)
            while not self.state.closing.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
        elif fault == "no HTTP":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            self.close_connection = True
        elif fault == "no choices":
            self.reply({"object": "chat.completion", "choices": []})
        elif fault == "router":
            self.reply({"error": {"message": "the model is busy", "code": 502}})
        elif fault == "abort":
            answer = self.state.completion(body)
            answer["choices"][0]["finish_reason"] = "abort"
            self.reply(answer)
        elif fault == "cut JSON":
            self.reply(cut)
        elif fault == "HTML":
            self.reply(b"<!doctype html><title>Hello</title>", Content_Type="text/html")
        else:
            raise AssertionError(fault)

    def start(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        names = {"Content_Type": "application/json"} | headers
        for name, value in names.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.start(status, len(raw), **headers)
        self.wfile.write(raw)


FAULTS = (
    *(429, 500, 502, 503, 504, 408),
    *("drop", "half", "no HTTP", "no choices", "router", "abort", "cut JSON", "HTML"),
)
"""Faults after which the same request succeeds, but for those that take until a time-out."""


def mean_colour(url: str) -> tuple[int, ...]:
    """The rounded mean colour of the image in a data URL."""
    kind, _, data = url.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert kind == f"data:image/{image.format.lower()}"
    assert image.mode == "RGB"
    return tuple(int(v) for v in np.asarray(image).mean((0, 1)).round())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is no problem of the server."""


@contextmanager
def running(**settings: Any) -> Iterator[ChatServer]:
    """A server that answers at `url`."""
    state = ChatServer(**settings)
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
