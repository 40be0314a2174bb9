"""Consent: which folders and Hub repositories may run their Python code.

Only the option `--trust-remote-code NAME` of a command gives consent. Nothing in a recipe, a
model's folder or a run's folder gives it. Code of mmkd and of installed packages needs none.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from mmkd.errors import CheckpointError, MmkdError
from mmkd.runtime.files import sha256

OPTION = "--trust-remote-code"
CODE = (".py", ".yaml", ".yml")
"""Suffixes of the files of a trusted folder whose checksums are kept: code and task files."""

_granted: dict[str, str] = {}  # key -> the name as it was given
_ran: dict[str, dict[str, str]] = {}  # name -> {file: sha256} of modules that were run


def grant(name: str) -> None:
    """Let the code of a model, a processor or a task folder run.

    Args:
        name: folder or Hub id. Consent to a folder includes the folders in it.
    """
    _granted.setdefault(_key(name), name)


def granted(name: str | Path | None) -> bool:
    """Whether the code of this folder or Hub id may run."""
    if not name:
        return False
    key = _key(str(name))
    if key in _granted:
        return True
    return os.path.isabs(key) and any(str(p) in _granted for p in Path(key).parents)


def inherit(name: str | Path, source: str | None) -> None:
    """Give a folder the consent of the model that it was written from.

    Args:
        name: the folder.
        source: folder or Hub id of that model; without consent to it nothing is granted.
    """
    if granted(source):
        grant(str(name))


def withdraw() -> None:
    """Remove all consent, and the notes of which code has run."""
    _granted.clear()
    _ran.clear()


def words() -> list[str]:
    """The consent as command-line options, for processes that this one starts."""
    return [word for name in _granted.values() for word in (OPTION, name)]


def how(name: str | Path) -> str:
    """How to give consent, for the end of a message."""
    return f"read that code; if you trust it, add {OPTION} {name} to the command"


def record() -> dict[str, dict[str, str]]:
    """The code that consent was given to, for a run's provenance: {name: {file: SHA-256}}."""
    found: dict[str, dict[str, str]] = {}
    for key, name in _granted.items():
        found[name] = dict(_ran.get(key, {}))
        folder = Path(key)
        if folder.is_dir() and os.path.isabs(key):
            files = sorted(p for p in folder.rglob("*") if p.suffix in CODE and p.is_file())
            found[name] |= {p.relative_to(folder).as_posix(): sha256(p) for p in files}
    return found


ADAPTER = "it holds an adapter (adapter_config.json), not a complete model"
MERGE = "merge it into its model and save that, or remove the adapter's files"
PICKLED = "one of its weight files is pickled; such a file can run code and is not read"


@contextmanager
def guard(loaded: str, *, trusted: bool = False) -> Iterator[None]:
    """Refuse code without consent, pickled weights and adapters while transformers loads a model.

    The check is made where transformers opens code and weights. The config is not enough: it may
    name the code of another repository, and an adapter names another model.

    Args:
        loaded: the folder or Hub id that is loaded.
        trusted: let the code of `loaded` run without consent.

    Raises:
        CheckpointError: transformers tried to open one of them. It is also raised if transformers
            caught this error itself and then failed with another one.
    """
    from transformers import dynamic_module_utils
    from transformers.generation import utils as generation
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    open_module, find_adapter = (
        dynamic_module_utils.get_cached_module_file,
        peft.find_adapter_config_file,
    )
    refused: list[CheckpointError] = []

    def refuse(what: str, where: str, hint: str) -> NoReturn:
        refused.append(CheckpointError(what, where=where, hint=hint))
        raise refused[-1]

    def checked(name: str | os.PathLike[str], module_file: str, *more: Any, **settings: Any) -> str:
        if not granted(str(name)) and not (trusted and _key(str(name)) == _key(loaded)):
            refuse(f"its Python code ({module_file}) may not run", str(name), how(str(name)))
        path = open_module(str(name), module_file, *more, **settings)
        _note(str(name), module_file, path)
        return path

    def no_adapter(name: str | os.PathLike[str], **settings: Any) -> None:
        if find_adapter(str(name), **settings) is not None:
            refuse(ADAPTER, str(name), MERGE)

    def no_pickle(*_: Any, **__: Any) -> Any:
        refuse(PICKLED, loaded, "give weights as safetensors")

    with ExitStack() as stack:
        for module in (dynamic_module_utils, generation):
            stack.enter_context(mock.patch.object(module, "get_cached_module_file", checked))
        for module in (auto_factory, peft):
            stack.enter_context(mock.patch.object(module, "find_adapter_config_file", no_adapter))
        stack.enter_context(mock.patch("torch.load", no_pickle))
        try:
            yield
        except MmkdError:
            raise
        except Exception as error:
            if refused:
                raise refused[0] from error
            raise


def _note(name: str, module_file: str, path: str) -> None:
    """Keep the checksum of a module that is about to run."""
    from transformers.utils import HF_MODULES_CACHE

    whole = Path(HF_MODULES_CACHE) / path
    if whole.is_file():
        _ran.setdefault(_key(name), {})[module_file] = sha256(whole)


def _key(name: str) -> str:
    """The key of a name: the real path of a folder, or the Hub id."""
    return os.path.realpath(name) if os.path.isdir(name) else name
