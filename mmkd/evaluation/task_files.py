"""lmms-eval's task files, read without importing what they name."""

from pathlib import Path
from typing import Any

from mmkd.runtime.formats import FormatError, parse_yaml


def read_task(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a task file over those of the files that it includes; empty if it is none.

    Args:
        path: the file.
        above: files that include it; what includes one of them again adds nothing.
    """
    try:
        config = read_own_keys(path)
    except FormatError:
        return {}
    base: dict[str, Any] = {}
    for name in reversed(included(config)):
        inner = path.parent / name
        if inner not in (path, *above):
            base |= read_task(inner, (path, *above))
    return base | {key: value for key, value in config.items() if key != "include"}


def read_own_keys(path: Path) -> dict[str, Any]:
    """The keys of a task file, `include` among them.

    Raises:
        FormatError: it cannot be read, or is no mapping.
    """
    try:
        config = parse_yaml(path.read_bytes(), task=True)
    except FormatError:
        raise
    except (OSError, ValueError) as error:  # an included name may hold a NUL
        raise FormatError("it cannot be read") from error
    if not isinstance(config, dict):
        raise FormatError("no mapping")
    return config


def included(config: dict[str, Any]) -> list[str]:
    """The names of files that the keys of a task file include."""
    said = config.get("include")
    listed = said if isinstance(said, list) else [said]
    return [name for name in listed if isinstance(name, str)]


def data_files(config: dict[str, Any], folder: Path) -> list[Path]:
    """The local files with the documents of a task; none if they come from elsewhere.

    Args:
        config: the task's keys.
        folder: where its file is, which its paths are relative to.
    """
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        files = files.get(config.get("test_split")) or next(iter(files.values()), None)
    listed = files if isinstance(files, list) else [files]
    return [folder / name for name in listed if isinstance(name, str) and "://" not in name]
