"""Where runs are written, and where models come from."""

import os
import shutil
import tempfile
from pathlib import Path

from mmkd.commands.doctor.isolated import Finding

GIB = 2**30
LEAST = GIB


def folder(path: Path) -> list[Finding]:
    """Whether a folder can be written and has room. If it does not exist yet, the nearest folder
    above it is checked. Nothing is left in it."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"mmkd")
            file.flush()
    except OSError as error:
        return [Finding("broken", f"{place}: {error.strerror}")]
    free = shutil.disk_usage(place).free
    detail = f"{path}: {free / GIB:.1f} GiB free"
    if free < LEAST:
        return [Finding("broken", detail, f"free space on the disk of {place}")]
    return [Finding("ok", detail)]


def hub() -> list[Finding]:
    from huggingface_hub import constants

    from mmkd.runtime.hub import ask

    if constants.HF_HUB_OFFLINE:
        names = " ".join(n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if n in os.environ)
        detail = f"offline ({names}): folders and the hub cache only"
        return [Finding("missing", detail, f"unset {names}")]
    if (reason := ask(constants.ENDPOINT)) is not None:
        return [Finding("broken", f"{constants.ENDPOINT} cannot be reached ({reason})")]
    return [Finding("ok", f"{constants.ENDPOINT} answers")]


def login() -> list[Finding]:
    """Whether there is a token; never which."""
    from huggingface_hub import get_token

    if get_token() is None:
        return [Finding("missing", "gated models and uploads need it")]
    given = any(os.environ.get(n) for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return [Finding("ok", f"a token is set by {'the environment' if given else 'hf auth login'}")]


def hub_cache() -> list[Finding]:
    from huggingface_hub import constants

    return folder(Path(constants.HF_HUB_CACHE))
