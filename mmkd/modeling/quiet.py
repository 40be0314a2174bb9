"""Silence libraries that print while they load and save models."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context manager that turns off the progress bars of transformers, and DeepSpeed's message
    that there is no GPU. (transformers imports DeepSpeed if it is installed.)"""
    shown = logging.is_progress_bar_enabled()
    is_chosen = "DS_ACCELERATOR" in os.environ or torch.cuda.is_available()
    if not is_chosen:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not is_chosen:
            os.environ.pop("DS_ACCELERATOR", None)
