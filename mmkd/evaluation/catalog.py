"""Which tasks there are, and whether they can be scored here: read from task files alone.

lmms-eval needs eight seconds to index its own two thousand; nothing of it is imported here.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmkd.errors import DataError, MmkdError
from mmkd.evaluation.foreign_tasks import check_name, require_consent
from mmkd.evaluation.standard import ALIASES, COLUMNS
from mmkd.evaluation.task_files import data_files, read_task

# Names of metrics that a language model's verdicts make: gpt_eval_score, llm_as_judge_eval.
_JUDGED = re.compile(r"(^|_)(gpt4?|llm|judge)(_|$)")
_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
GENERATION = "generate_until"
SCENES = Path(__file__).parent / "tasks"
Index = dict[str, "Task"]


@dataclass(frozen=True)
class Task:
    """One name of lmms-eval: a task, a group of tasks or a tag that tasks share.

    Attributes:
        path: its file; None for a tag.
        config: the file's keys; `!function` values are the functions' names.
        members: names of a group's or tag's tasks; empty for a task.
    """

    name: str
    path: Path | None
    config: Mapping[str, Any]
    members: tuple[str, ...] = ()

    @property
    def is_tag(self) -> bool:
        return self.path is None

    @property
    def split(self) -> str | None:
        """The split that is scored."""
        return self.config.get("test_split") or self.config.get("validation_split")

    @property
    def metrics(self) -> list[Mapping[str, Any]]:
        return [metric for metric in self.config.get("metric_list") or [] if metric]

    @property
    def answered(self) -> str:
        """How a model answers: `generate_until`, or by likelihoods or in several rounds."""
        return str(self.config.get("output_type", GENERATION))

    @property
    def only_submits(self) -> bool:
        """All it makes is a file for a benchmark's server."""
        return bool(self.metrics) and all(is_submission(m) for m in self.metrics)

    @property
    def judged(self) -> str | None:
        """A metric that a language model with an API computes."""
        for metric in self.metrics:
            static = str(metric.get("aggregation")).endswith("_static")
            if _JUDGED.search(str(metric.get("metric"))) and not static:
                return str(metric["metric"])
        return None


def is_submission(metric: Mapping[str, Any]) -> bool:
    """The metric is a file for a benchmark's server, not a number."""
    return "submission" in str(metric.get("metric"))


@cache
def bundled() -> Index:
    """lmms-eval's own tasks; empty where it is not installed."""
    folder = _bundled_folder()
    return index(folder) if folder.is_dir() else {}


def _bundled_folder() -> Path:
    """Where lmms-eval has its own tasks; a path that is none where it is not installed."""
    spec = importlib.util.find_spec("lmms_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / "tasks" if places else Path(os.devnull) / "tasks"


def index(folder: Path) -> Index:
    """Everything that can be asked for by name in a folder of task files."""
    found: Index = {}
    tags: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        config = read_task(path)
        name = config.get("task")
        members = tuple(_member_names(name)) if isinstance(name, list) else ()
        name = config.get("group") if members else name
        if not isinstance(name, str):
            continue
        found[name] = Task(name, path, config, members)
        listed = [] if members else config.get("tag") or []
        for tag in [listed] if isinstance(listed, str) else listed:
            tags.setdefault(tag, []).append(name)
    return {t: Task(t, None, {}, tuple(sorted(names))) for t, names in tags.items()} | found


def _member_names(listed: Iterable[Any]) -> Iterable[str]:
    for entry in listed:
        inner = entry.get("task") if isinstance(entry, dict) else entry
        yield from _member_names(inner) if isinstance(inner, list) else [str(inner)]


@dataclass(frozen=True)
class Chosen:
    """The tasks that were asked for.

    Attributes:
        names: what lmms-eval is to run: tasks and groups, without aliases and tags.
        tasks: the single tasks of these groups.
        folders: folders that hold the files of all of them.
    """

    names: list[str]
    tasks: list[Task]
    folders: list[Path]


def choose(asked: Sequence[str], include: Path | None) -> Chosen:
    """Find tasks by name, those of `include` before lmms-eval's own, and refuse those without a
    score.

    Raises:
        MmkdError: none is asked for, a name is unknown, or a task needs likelihoods, a judge or a
            server, or its file runs code without consent.
        DataError: `include` or a data file that a task names does not exist.
    """
    if not asked:
        raise MmkdError("no tasks to evaluate", hint="name at least one, e.g. scenes_pope")
    if include is not None and not include.is_dir():
        raise DataError("no such folder of tasks", where=str(include), hint="give DATA/tasks")
    own = index(include) if include else {}
    known = own if set(asked) <= set(own) else bundled() | own
    names: list[str] = []
    for name in asked:
        name = name if name in own else ALIASES.get(name, name)
        if name not in known:
            raise _unknown(name, own, known, include)
        names += known[name].members if known[name].is_tag else [name]
    names = list(dict.fromkeys(names))
    reached = {entry.name: entry for name in names for entry in _reachable(name, known)}
    for entry in reached.values():
        check_name(entry.name, entry.path)
    # All files of the folder: lmms-eval looks a name up itself, and may find it in another one.
    beside = sorted(include.rglob("*.yaml")) if include is not None else []
    asked_for = [entry.path for entry in reached.values() if entry.path is not None]
    require_consent([*beside, *asked_for], _bundled_folder())
    tasks = [entry for entry in reached.values() if not entry.members]
    for task in tasks:
        _refuse_unscored(task, known)
        _check_files(task)
    folders = {path.parent: None for entry in reached.values() if (path := entry.path)}
    return Chosen(names, tasks, [*([include] if include else []), *folders])


def _reachable(name: str, known: Index) -> Iterable[Task]:
    if name in known:
        yield known[name]
        for member in known[name].members:
            yield from _reachable(member, known)


def _unknown(name: str, own: Index, known: Index, include: Path | None) -> MmkdError:
    if include is None and name in index(SCENES):
        return MmkdError(
            f"task {name} is mmkd's own and comes with its data",
            hint="set `include` to the folder of its file, such as data/scenes/tasks",
        )
    for names in (own, [*known, *ALIASES]):
        if near := difflib.get_close_matches(name, names, n=1):
            break
    nearest = f"did you mean {near[0]}? " if near else ""
    listed = ", ".join(n for n, t in own.items() if not t.is_tag) if own else "those of lmms-eval"
    more = " and those of lmms-eval" if own else ""
    return MmkdError(
        f"unknown task {name!r}",
        where=str(include) if include else None,
        hint=f"{nearest}known tasks: {listed}{more}",
    )


def _refuse_unscored(task: Task, known: Index) -> None:
    if task.answered != GENERATION:
        raise MmkdError(
            f"task {task.name} is not answered by generation (output_type {task.answered})",
            hint=_instead(task, known),
        )
    if task.only_submits:
        raise MmkdError(
            f"task {task.name} only writes a file for the benchmark's server, it has no score",
            hint=_instead(task, known),
        )
    if task.judged and not any(os.environ.get(key) for key in _KEYS):
        raise MmkdError(
            f"task {task.name} asks a language model to judge ({task.judged})",
            hint=f"{_instead(task, known)}, or set OPENAI_API_KEY",
        )


def _instead(task: Task, known: Index) -> str:
    """The most similar task of the same benchmark that can be scored."""
    assert task.path is not None
    scored = [
        other.name
        for other in known.values()
        if other.path and other.path.parent == task.path.parent
        if other.metrics and other.answered == GENERATION
        if not other.only_submits and not other.judged
    ]
    known_well = [name for name in scored if name in COLUMNS]
    near = difflib.get_close_matches(task.name, known_well or scored, n=1, cutoff=0.0)
    return f"use {near[0]}" if near else "use another task"


def _check_files(task: Task) -> None:
    """Refuse a task whose own files are missing: lmms-eval would retry five times, then crash."""
    if task.config.get("dataset_path") not in ("parquet", "json", "csv"):
        return
    assert task.path is not None
    for path in data_files(dict(task.config), task.path.parent):
        if not path.is_file():
            raise DataError(
                f"the data of task {task.name} is missing: {os.path.normpath(path)}",
                where=str(task.path),
                hint="build the data set first (mmkd data build scenes --out DIR)",
            )


def own_files(asked: Iterable[str], include: Path | None, local: Path | None) -> list[Path]:
    """Files on this machine that tasks of a folder are defined by and read, and all files of
    `local`. Tasks that come with lmms-eval, and data on the Hub, have none.

    Args:
        asked: names of tasks; unknown ones are passed over.
        include: folder of task files.
        local: folder with the tasks' data.
    """
    known = index(include) if include is not None and include.is_dir() else {}
    found = [path for path in local.rglob("*") if path.is_file()] if local is not None else []
    for name in asked:
        for task in _reachable(name, known):
            if task.path is not None:
                found += [task.path, *task.path.parent.glob("*.py")]
                found += data_files(dict(task.config), task.path.parent)
    return sorted({path for path in found if path.is_file()})
