"""Data of lmms-eval's tasks on the Hub: loaded without a login unless it is gated, and looked up
before anything is scored."""

from functools import cache
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_dataset_builder
from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

from mmkd.errors import DataError
from mmkd.evaluation.catalog import Task
from mmkd.evaluation.local import BUILDERS, with_pictures
from mmkd.evaluation.standard import PICTURES
from mmkd.runtime import hub

OWN = ("video", "From_YouTube", "load_from_disk", "builder_script", "data_files", "data_dir")
"""Settings with which lmms-eval does not load a task's data by name from the Hub."""


def override(task: str, config: dict[str, Any]) -> dict[str, Any]:
    """A task's keys without lmms-eval's demand for a login. A stored token is still used."""
    settings = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "token"}
    changed: dict[str, Any] = {"dataset_kwargs": settings}
    if task in PICTURES:
        path, split = config["dataset_path"], config["test_split"]
        changed["process_docs"] = lambda documents: with_pictures(
            documents, load_dataset(path, PICTURES[task], split=split)
        )
    return config | changed


def require_data(task: Task) -> None:
    """Look up a task's data set on the Hub, or offline in its cache.

    Raises:
        DataError: it cannot be reached.
    """
    path, settings = task.config.get("dataset_path"), task.config.get("dataset_kwargs") or {}
    if path in (None, *BUILDERS) or any(settings.get(key) for key in OWN):
        return
    silence = None if Path(str(path)).exists() else hub.unreachable()
    names = {task.config.get("dataset_name"), PICTURES.get(task.name, "")} - {""}
    try:
        for name in names:
            _find(str(path), name, settings.get("revision"))
    except Exception as error:  # of the network, the Hub, or the data set's own files
        lines = str(error).splitlines() or [type(error).__name__]
        hint = {
            None: "check its name and the network, `hf auth login` for what is gated",
            hub.OFFLINE: "unset HF_HUB_OFFLINE",
        }.get(silence) or hub.hint("check its name")
        reason = lines[0] if silence in (None, hub.OFFLINE) else f"the Hub cannot be: {silence}"
        raise DataError(
            f"the data of task {task.name} cannot be reached ({reason})",
            where=str(path),
            hint=f"{hint}, or give its files as `local`",
        ) from error


@cache
def _find(path: str, name: str | None, revision: str | None) -> None:
    # Every model of a run asks again.
    load_dataset_builder(path, name, revision=revision, cache_dir=_resolve_hf_datasets_cache_dir())
