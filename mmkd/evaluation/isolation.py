"""Keeps lmms-eval's side effects inside the evaluation.

lmms-eval reseeds `random`, numpy and torch, removes loguru's handlers, ignores all warnings, and
makes Pillow accept truncated images.
"""

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import ImageFile
from tqdm import tqdm

from mmkd.evaluation.pictures import guarded


@contextmanager
def isolated(progress: bool | None = None) -> Iterator[None]:
    """Afterwards, random streams, loguru handlers, warning filters, progress bars and Pillow are as
    before.

    Args:
        progress: show the progress bars of lmms-eval and datasets; None shows them on a terminal.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    with (
        random_state(),
        warnings.catch_warnings(),
        filled_pictures(),
        guarded(),
        warnings_only(),
        progress_bars(shown),
    ):
        yield


@contextmanager
def random_state() -> Iterator[None]:
    """Restore the state of random, numpy and torch (every GPU included)."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextmanager
def silent_imports() -> Iterator[None]:
    """For checks of tasks: hides warnings and logs of their modules. lmms-eval's evaluator, which
    changes torch.distributed's timeouts, is not imported."""
    with random_state(), warnings.catch_warnings(), filled_pictures(), guarded(), no_handlers():
        yield


@contextmanager
def filled_pictures() -> Iterator[None]:
    """Inside, Pillow accepts truncated images, as lmms-eval's import sets it. In training data
    they are errors."""
    with mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", True):
        yield


@contextmanager
def no_handlers() -> Iterator[None]:
    """Keep the caller's loguru handlers safe: inside there are none.

    loguru can remove a handler but not put it back, so its table of handlers is set aside.
    """
    from loguru import logger

    core: Any = logger._core  # type: ignore[attr-defined]
    handlers, level = core.handlers, core.min_level
    core.handlers, core.min_level = {}, float("inf")
    try:
        yield
    finally:
        logger.remove()
        core.handlers, core.min_level = handlers, level


@contextmanager
def warnings_only() -> Iterator[None]:
    """Show loguru's warnings and errors on stderr inside."""
    from loguru import logger

    with no_handlers():
        import lmms_eval.evaluator  # noqa: F401  importing it replaces the handlers: do that first

        logger.remove()
        logger.add(sys.stderr, level="WARNING", format="lmms-eval: {message}")
        yield


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Turn the bars of lmms-eval, datasets and transformers off, unless `shown`."""
    if shown:
        yield
        return
    import datasets
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from transformers.utils import logging

    datasets_bars = not datasets.are_progress_bars_disabled()
    weights_bar = logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with ExitStack() as stack:
            for module in (lmms_eval.api.task, lmms_eval.evaluator):
                stack.enter_context(mock.patch.object(module, "tqdm", _silent_tqdm))
            yield
    finally:
        if datasets_bars:
            datasets.enable_progress_bars()
        if weights_bar:
            logging.enable_progress_bar()


def _silent_tqdm(*args: Any, **kwargs: Any) -> Any:
    return tqdm(*args, **{**kwargs, "disable": True})
