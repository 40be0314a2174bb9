"""Runs chat templates with limits of time and memory.

A chat template is a program that comes with a model. `transformers` runs it in Jinja's sandbox,
which limits neither time nor memory: a template could loop for days, or create a string of
terabytes in one call.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any
from unittest import mock

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

SECONDS = 10.0
"""Most CPU time of one rendering, in seconds. Templates of published models take milliseconds."""
LONGEST = 2**26
"""Most characters or items of one value that a template creates, and of the text that it writes."""
MOST_BITS = 2**16
"""Most bits of an integer that a template computes."""
GROWTH = 2**30
"""Most bytes by which the process may grow while a template runs."""
_LOOK_SECONDS = 0.05
WIDTH = re.compile(r"[%:.][-+ #0<>=^,_]*(\d+)")
NESTED = re.compile(r":[^{}]*\{")
_FORMATS = ("format", "format_map")
_PADS = (
    *("ljust", "rjust", "center", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice"),
    *("tojson", "to_bytes", "lipsum", "generate_lorem_ipsum"),
)
_MULTIPLIES = ("replace", "join", "translate")


class TemplateBoundError(Exception):
    """A template ran for too long, or needed too much memory."""


def size(value: Any) -> int:
    """Characters or items of a template's value."""
    try:
        return len(value)
    except Exception:  # a value without a length
        return 1


def _check(made: int, most: int = LONGEST) -> None:
    if made > most:
        raise TemplateBoundError("it makes a value that is too large")


def _check_call(name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """Check that a call of a filter or a method makes nothing too large."""
    texts = [a for a in arguments if isinstance(a, str | bytes)]
    numbers = [abs(a) for a in arguments if isinstance(a, int)]
    if name in _FORMATS:
        _check_format(value, numbers)
    elif name in _PADS:
        _check(max([0, *numbers]) * max(1, min(size(value), 2**10)))
    elif name in _MULTIPLIES:
        others = arguments if name == "join" else texts
        _check(size(value) * max([1, *map(size, others)]), 2 * LONGEST)


def _check_format(text: Any, numbers: list[int]) -> None:
    """Check the widths that a format such as `%1000000000d` or `{:1000000000}` asks for."""
    text = str(text)
    _check(max([0, *(int(found[:12]) for found in WIDTH.findall(text))]))
    if "*" in text or NESTED.search(text):  # the width is one of the arguments
        _check(max([0, *numbers]))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Some filters get their context or environment first.
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        value = args[first] if len(args) > first else ""
        _check_call(name, value, (*args[first + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    return call


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, each bounded when it is put in."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _bounded_filter(name, function))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox in which single operations make nothing too large."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        filters, self.filters = self.filters, _Filters()
        for name, function in filters.items():
            self.filters[name] = function

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            factor = max(right, 0) if operator == "**" else 1
            _check(left.bit_length() * factor + right.bit_length(), MOST_BITS)
        elif operator == "+":
            _check(size(left) + size(right))
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _check(size(one) * max(times, 0))
        elif operator == "%" and isinstance(left, str | bytes):
            given = right if isinstance(right, tuple) else (right,)
            _check_format(left, [abs(v) for v in given if isinstance(v, int)])
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function for a template. The parameter names are Jinja's, which do not collide
        with a template's keyword arguments."""
        method = getattr(__obj, "__wrapped__", __obj)  # `format` is wrapped by the sandbox
        name, value = getattr(method, "__name__", ""), getattr(method, "__self__", "")
        _check_call(name, value, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)


_transformers_own: Any = chat_template_utils._compile_jinja_template
_compiling = threading.Lock()
_inside = threading.local()


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    sandbox = mock.patch.object(
        chat_template_utils, "ImmutableSandboxedEnvironment", BoundedEnvironment
    )
    with _compiling, sandbox:
        return _transformers_own.__wrapped__(template)


def _compile(template: str) -> Any:
    return (_compiled if getattr(_inside, "bounded", False) else _transformers_own)(template)


# Patched once: threads that patch and restore in turn would undo each other's patches.
chat_template_utils._compile_jinja_template = _compile  # type: ignore[assignment]


@dataclass
class _Running:
    """A template that is running.

    Attributes:
        begun: CPU time of its thread at the start, in seconds.
        memory: of this process at the start, in bytes.
        stopped: the reason why it was stopped; "" if it was not.
    """

    begun: float
    memory: int
    stopped: str = ""


class _Watch:
    """A thread that stops templates which exceed a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, _Running] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self) -> Iterator[None]:
        """Raise `TemplateBoundError` in the block if it takes too long.

        A thread must not enter a second block inside the first.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
        thread = threading.get_ident()
        running = _Running(_cpu_seconds(thread), _memory())
        with self._lock:
            self._running[thread] = running
        self._wake.set()
        try:
            yield
        finally:
            while thread in self._running:
                with suppress(TemplateBoundError), self._lock:
                    self._running.pop(thread, None)
            if running.stopped:  # it may have ended by itself in the same moment
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _look(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                if not self._running:
                    self._wake.clear()
                for thread, running in self._running.items():
                    self._end(thread, running)

    @staticmethod
    def _end(thread: int, running: _Running) -> None:
        if running.stopped:
            return
        used = _cpu_seconds(thread) - running.begun
        late = used > SECONDS
        # Other threads allocate too. A template that fills this much memory has worked for it.
        large = used > _LOOK_SECONDS and _memory() - running.memory > GROWTH
        if late or large:
            running.stopped = "late" if late else "large"
            kind = _TooLongError if late else _TooLargeError
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread), ctypes.py_object(kind)
            )


class _TooLongError(TemplateBoundError):
    def __str__(self) -> str:
        return f"it runs for more than {SECONDS:g} s"


class _TooLargeError(TemplateBoundError):
    def __str__(self) -> str:
        return f"it takes more than {GROWTH >> 20:,} MiB"


_watch = _Watch()


def _begin_again() -> None:
    """Create new locks and a new watch in a forked process, which has no thread of its parent."""
    global _compiling, _watch
    _compiling, _watch = threading.Lock(), _Watch()


os.register_at_fork(after_in_child=_begin_again)


def _cpu_seconds(thread: int) -> float:
    """CPU time of a thread, in seconds. Unlike wall time, it does not grow while others run."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()


def _memory() -> int:
    """Bytes of memory that this process uses; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the chat templates that this thread runs in the block.

    Raises:
        TemplateBoundError: a template exceeded a limit.
    """
    _inside.bounded = True
    try:
        with _watch.over():
            yield
    finally:
        _inside.bounded = False
