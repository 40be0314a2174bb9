"""lmms-eval's index of tasks, with mmkd's changes to their configurations."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager

from mmkd.data.sources.files import exact
from mmkd.errors import MmkdError
from mmkd.evaluation import hub
from mmkd.evaluation.catalog import Chosen, choose, is_submission
from mmkd.evaluation.local import LocalData, find_local
from mmkd.evaluation.options import generate_options
from mmkd.evaluation.standard import PAIRED
from mmkd.evaluation.task_files import data_files


class ChosenTasks(TaskManager):
    """The chosen tasks as lmms-eval defines them, prompts and scoring included.

    Three things differ: documents come from `local` if it has the task, documents on the Hub need
    no login unless they are gated, and metrics that only make a file for a benchmark's server are
    left out.
    """

    def __init__(self, chosen: Chosen, local: Mapping[str, LocalData]):
        self.chosen, self.local = chosen, local
        folders = [str(folder) for folder in chosen.folders]
        super().__init__("ERROR", include_path=folders, include_defaults=False)

    def _get_config(self, name: str) -> dict[str, Any]:
        try:
            config: dict[str, Any] = super()._get_config(name)
        except ImportError as error:
            raise _missing_package(name, error) from error
        if config.get("metric_list"):
            scored = [m for m in config["metric_list"] if m and not is_submission(m)]
            config = config | {"metric_list": scored}
        if name in self.local:
            return self.local[name].override(config)
        if (settings := config.get("dataset_kwargs") or {}).get("data_files"):
            files = _meant(settings["data_files"])
            config = config | {"dataset_kwargs": {**settings, "data_files": files}}
        return hub.override(name, config)

    def target_template(self, name: str) -> Any:
        """A task's `doc_to_target`: the name of a column, a template or a function."""
        return self._get_config(name).get("doc_to_target")

    def data_folders(self) -> list[Path]:
        """The folders of the tasks' files and of their documents that are on this machine."""
        found = [path.parent for data in self.local.values() for path in data.files + data.pictures]
        for task in self.chosen.tasks:
            config = dict(task.config)
            settings = config.get("dataset_kwargs") or {}
            if task.path is not None:
                files = data_files(config, task.path.parent)
                found += [task.path.parent, *(file.parent for file in files)]
            named = (config.get("dataset_path"), settings.get("data_dir"))
            found += [Path(str(name)) for name in named if name and Path(str(name)).is_dir()]
        return found


def find_tasks(
    asked: Sequence[str], include: Path | None, local: Path | None, limit: int | None = None
) -> ChosenTasks:
    """The tasks of these names, after a check of their imports, settings and data.

    Raises:
        MmkdError: a task is unknown, has no score here or with this limit, needs a package that is
            missing, or has a generation setting that mmkd does not know.
        DataError: a task's local data is missing or of another schema, or its data on the Hub
            cannot be reached.
    """
    chosen = choose(asked, include)
    for task in chosen.tasks:
        if task.name in PAIRED and limit is not None and limit % 2:
            raise MmkdError(
                f"task {task.name} scores its questions in pairs, and limit {limit} splits a pair",
                hint="give an even limit",
            )
    found = ChosenTasks(chosen, find_local(chosen.tasks, local) if local else {})
    for task in chosen.tasks:
        config = found._get_config(task.name)  # imports what its functions need
        generate_options(config.get("generation_kwargs") or {}, f"task {task.name}")
    for task in chosen.tasks:
        if task.name not in found.local:
            hub.require_data(task)
    return found


def _meant(files: Any) -> Any:
    """A task's `data_files` in which the name of a file that is there means that file."""
    if isinstance(files, dict):
        return {split: _meant(inner) for split, inner in files.items()}
    if isinstance(files, list):
        return [_meant(inner) for inner in files]
    is_file = isinstance(files, str) and os.path.isfile(files)
    return exact(Path(files)) if is_file else files


def _missing_package(task: str, error: ImportError) -> MmkdError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    package = (getattr(cause, "name", None) or "").partition(".")[0]
    return MmkdError(
        f"task {task} needs the package {package}" if package else str(cause),
        where="lmms-eval",
        hint=f"pip install {package}" if package else "install what it imports",
    )
