"""Consent to the code of task files that are not installed with lmms-eval.

A task file can run Python in many ways: by `!function`, by Jinja templates, by downloaded metrics,
by settings of its data. It therefore needs consent. A file needs none if it contains only functions
of `mmkd.evaluation.scenes`, local data and plain values.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mmkd.data.content import printable
from mmkd.errors import MmkdError
from mmkd.evaluation.task_files import included, read_own_keys, read_task
from mmkd.runtime import consent
from mmkd.runtime.formats import FormatError, decoded

SCORING = "mmkd.evaluation.scenes"
FUNCTION = re.compile(rf"{re.escape(SCORING)}\.[a-z][a-z0-9_]*")
WORD = re.compile(r"\w+")
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq",
                                                 "map", "merge")}  # fmt: skip
DATA_SET = re.compile(r"(?!pandas$)\w[\w.-]*(/\w[\w.-]*)?")
"""`datasets` runs no code of these; its builder `pandas` opens pickled files in some versions."""
FUNCTIONS = ("process_docs", "doc_to_visual", "process_results")
COLUMNS = ("doc_to_text", "doc_to_target")
FREE = ("tag", "include", "test_split", "validation_split", "output_type", "metadata",
        "generation_kwargs")  # fmt: skip


def require_consent(paths: Iterable[Path], own: Path) -> None:
    """Refuse task files that can run code without consent.

    Args:
        paths: files of tasks, groups and what they include.
        own: the folder of the task files that are installed with lmms-eval; they need no consent.

    Raises:
        MmkdError: a file can run code, and its folder has no consent.
    """
    for path in paths:
        whole = path.resolve()
        if whole.is_relative_to(own.resolve()) or consent.granted(path.parent):
            continue
        if (why := _runs_code(path)) is not None:
            raise MmkdError(
                f"a task file can run Python ({why})",
                where=str(path),
                hint=consent.how(path.parent),
            )


def check_name(name: str, path: Path | None) -> None:
    """Check that a task's name can be used as a file name.

    Args:
        name: of the task.
        path: its file, for the message.

    Raises:
        MmkdError: the name is empty, has a slash or an unprintable character, or is `.` or `..`.
    """
    if "/" in name or "\\" in name or not name.isprintable() or name in ("", ".", ".."):
        raise MmkdError(
            f"the task's name {name!r} cannot be a file name",
            where=None if path is None else str(path),
            hint="give it another name",
        )


def _runs_code(path: Path) -> str | None:
    """The part of a task file, or of an included file, that can run code; None if none can."""
    if (path.parent / f"{SCORING}.py").exists():  # lmms-eval looks there first
        return f"{SCORING}.py is in the same folder"
    for file in _with_included(path):
        if isinstance(file, str):
            return file
        if (tag := _strange_tag(file)) is not None:
            return tag
    return _strange_key(read_task(path))


def _with_included(path: Path, above: tuple[Path, ...] = ()) -> Iterable[Path | str]:
    """A file and the files that it includes. A file that mmkd cannot read, or that is in another
    folder, is given as a text that describes it."""
    try:
        config = read_own_keys(path)
    except FormatError as error:  # lmms-eval may read it all the same
        yield f"{path.name}: {error}"
        return
    yield path
    names = included(config)
    if "include" in config and config["include"] not in (names, *names):
        yield "include"
    for name in names:
        inner = path.parent / name
        elsewhere = Path(name).is_file() and not (inner.is_file() and Path(name).samefile(inner))
        if Path(name).name != name or elsewhere:  # it may be taken from the working directory
            yield f"it includes {printable(name)}"
        elif inner in (path, *above):
            yield f"it includes {name}, which includes it"
        elif not inner.is_file():
            yield f"it includes {printable(name)}, which is not there"
        else:
            yield from _with_included(inner, (path, *above))


def _strange_tag(path: Path) -> str | None:
    """The first YAML tag of a file that is neither a plain type nor a function of `SCORING`."""
    found = yaml.compose(decoded(path.read_bytes()), Loader=yaml.SafeLoader)
    seen: set[int] = set()
    nodes = [found] if found is not None else []
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag == "!function" and isinstance(node, yaml.ScalarNode):
            if FUNCTION.fullmatch(node.value) is None:
                return f"!function {node.value}"
        elif node.tag not in TAGS:
            return node.tag
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
    return None


def _strange_key(config: dict[str, Any]) -> str | None:
    """The first key of a task, with its included files, that could make lmms-eval run code."""

    def is_function(value: Any) -> bool:
        return isinstance(value, str) and FUNCTION.fullmatch(value) is not None

    for key, value in config.items():
        if key == "task":
            known = all(isinstance(v, str) for v in (value if isinstance(value, list) else [value]))
        elif key in FREE:
            known = not _has(value, "{")
        elif key in FUNCTIONS:
            known = is_function(value)
        elif key in COLUMNS:
            known = is_function(value) or _is_word(value)
        elif key in ("dataset_path", "dataset_name"):
            known = isinstance(value, str) and DATA_SET.fullmatch(value) is not None
        elif key == "dataset_kwargs":
            known = isinstance(value, dict) and set(value) <= {"data_files", "token"}
            known = known and not _has(value, "://")
        elif key == "metric_list":
            known = "process_results" in config and all(
                isinstance(m, dict)
                and set(m) <= {"metric", "aggregation", "higher_is_better"}
                and _is_word(m.get("metric"))
                and is_function(m.get("aggregation"))
                for m in (value if isinstance(value, list) else [None])
            )
        else:
            known = False
        if not known:
            return f"{key}"
    return None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and WORD.fullmatch(value) is not None


def _has(value: Any, part: str) -> bool:
    """Whether a text in a value holds a part, such as the brace of a template."""
    if isinstance(value, dict):
        return any(_has(item, part) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return any(_has(item, part) for item in value)
    return isinstance(value, str) and part in value
