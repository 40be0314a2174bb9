"""The `generation_kwargs` of lmms-eval's tasks as arguments of `generate`.

Answers depend on the model and on the task's settings, not on the sampling settings of the
checkpoint, see `mmkd.data.generation`.
"""

from collections.abc import Mapping
from typing import Any

from mmkd.data.generation import SAMPLING, neutral_settings
from mmkd.errors import MmkdError, nearest

DEFAULT_NEW_TOKENS = 256
STOPS = ("until", "stop_sequences")
OF_OTHERS = ("image_aspect_ratio", "visual_cot", "seed")
"""Settings for some of lmms-eval's own models: how they prepare images and draw random numbers.
Here the processor prepares images, and the random numbers are always the same."""


def generate_options(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings of `generate` except for the special tokens. A temperature of 0 means greedy
    decoding, as everywhere in lmms-eval.

    Args:
        settings: a task's `generation_kwargs`.
        where: the task, for the error message.

    Raises:
        MmkdError: a setting is unknown.
    """
    options = neutral_settings()
    asked = {k: v for k, v in settings.items() if k not in (*STOPS, *OF_OTHERS)}
    for name in asked:
        if name not in options:
            raise MmkdError(
                f"its generation_kwargs have {name!r}, which mmkd does not know",
                where=where,
                hint=f"leave it out; {nearest(name, [*options, *STOPS])}",
            )
    temperature = settings.get("temperature")
    sample = bool(settings.get("do_sample", bool(temperature))) and temperature != 0
    if not sample:
        asked = {k: v for k, v in asked.items() if k not in SAMPLING}
    options |= {name: value for name, value in asked.items() if value is not None}
    return options | {
        "do_sample": sample,
        "num_beams": settings.get("num_beams") or 1,
        "max_new_tokens": settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
    }


def stop_strings(settings: Mapping[str, Any]) -> list[str]:
    """The strings that end an answer. They are not part of it."""
    found: list[str] = []
    for name in STOPS:
        stops = settings.get(name) or []
        found += [stops] if isinstance(stops, str) else list(stops)
    return found
