"""Errors of transformers and of the Hub's library, as one line with a hint."""

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from mmkd.errors import CheckpointError, MmkdError
from mmkd.modeling.quiet import quiet_libraries
from mmkd.runtime import consent, hub
from mmkd.runtime.files import read_json

FOLDER = "give a folder with config.json, safetensors and processor files, or a Hub id"
SAVE = "save the processor into the model's folder (processor.save_pretrained)"


@contextmanager
def one_line_errors(name: str, what: str, hint: str | None = None) -> Iterator[None]:
    """Context manager that turns errors of transformers into one line, without their log lines.

    Args:
        name: folder or Hub id that is loaded.
        what: "model" or "processor".
        hint: what the user can do; by default it depends on the error.

    Raises:
        CheckpointError: in place of any error that is not one of mmkd.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with quiet_libraries():
            yield
    except MmkdError:
        raise
    except Exception as error:  # missing and damaged files raise many different types
        raise _nowhere(error, name) or CheckpointError(
            f"cannot load the {what} ({first_sentence(error)})",
            where=name,
            hint=hint or _hint(error, name, what),
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _nowhere(error: BaseException, name: str) -> CheckpointError | None:
    """The error for a name that is neither a folder nor on the Hub; None for other errors."""
    causes = _causes(error)
    offline = LocalEntryNotFoundError | OfflineModeIsEnabled
    if any(isinstance(e, offline) for e in causes) and (reason := hub.unreachable()):
        return CheckpointError(
            f"no such folder, and the Hub cannot be reached ({reason})",
            where=name,
            hint=hub.hint("check the path"),
        )
    if any(type(e) is RepositoryNotFoundError for e in causes):
        return CheckpointError(
            "no such folder, and no such model on the Hub",
            where=name,
            hint="check the path or the id; a private model needs 'hf auth login'",
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and its chain of causes."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's message. The rest is often general advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sentence = lines[0].partition(". ")[0].removesuffix(".")
    return textwrap.shorten(sentence, 200, placeholder=" ...")


def _hint(error: BaseException, name: str, what: str) -> str:
    """A hint for an error of transformers."""
    causes = _causes(error)
    if "trust_remote_code" in str(error):
        return consent.how(name)
    if AutoModelForImageTextToText.__name__ in str(error):
        return "choose a model that reads images and writes text"
    if "num2words" in str(error):
        return "pip install num2words"
    wants = ["video processor", "torchvision"]
    if (Path(name) / "preprocessor_config.json").is_file():
        wants.append("image processor")  # the file exists, but its class cannot be imported
    if not is_torchvision_available() and any(word in str(error).lower() for word in wants):
        return "install the torchvision that fits your torch: `mmkd doctor` has the command"
    if isinstance(error, ImportError):
        return "install what is missing, or set attn_implementation to sdpa"
    if any(isinstance(e, SafetensorError | json.JSONDecodeError) for e in causes):
        return f"{_broken(Path(name))} is damaged: copy or download it again"
    if not Path(name).exists():
        if any(isinstance(e, GatedRepoError) for e in causes):
            return "ask for access on the model's page, then 'hf auth login'"
        if (reason := hub.unreachable()) is not None:
            return hub.hint(f"give a folder: the Hub cannot be reached ({reason})")
        return "check the id on the Hub; private and gated models need 'hf auth login'"
    return SAVE if what == "processor" else FOLDER


def _broken(folder: Path) -> str:
    """Name of a JSON file of a folder that cannot be parsed; "a file" if there is none."""
    for path in sorted(folder.glob("*.json")):
        try:
            read_json(path)
        except (OSError, ValueError):
            return path.name
    return "a file"
