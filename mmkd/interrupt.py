"""SIGTERM with grace: a stage ends its step, saves, and the command exits with status 0."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmkd import distributed
from mmkd.errors import AGAIN, StoppedError

_asked = False
_inside = False


def listen() -> None:
    """Hear SIGTERM from here on: it raises `StoppedError`, or waits for the step's end."""
    signal.signal(signal.SIGTERM, _heard)


def _heard(number: int, frame: Any) -> None:
    global _asked
    _asked = True
    if not _inside:
        raise StoppedError("stopped", mend=AGAIN)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, whoever works asks `asked` when it suits."""
    global _inside
    _inside = True
    try:
        yield
    finally:
        _inside = False


def asked(device: torch.device) -> bool:
    """Whether any rank was asked to stop; every rank calls it."""
    return bool(distributed.total(torch.tensor(float(_asked), device=device)))
