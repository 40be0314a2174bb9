"""lmms-eval's task files, read without importing what they name."""

from pathlib import Path
from typing import Any

from mmkd.runtime.formats import FormatError, parse_yaml


def read_task(path: Path) -> dict[str, Any]:
    """The keys of a task file over those of the files that it includes; empty if it is none."""
    try:
        config = parse_yaml(path.read_bytes(), task=True)
    except (OSError, FormatError):
        return {}
    if not isinstance(config, dict):
        return {}
    included = config.pop("include", [])
    base: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        if path.parent / name != path:
            base |= read_task(path.parent / name)
    return base | config


def data_files(config: dict[str, Any], folder: Path) -> list[Path]:
    """The local files behind the documents of a task; none if they come from elsewhere.

    Args:
        config: the task's keys.
        folder: where its file is, which its paths are relative to.
    """
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        files = files.get(config.get("test_split")) or next(iter(files.values()), None)
    listed = files if isinstance(files, list) else [files]
    return [folder / name for name in listed if isinstance(name, str) and "://" not in name]
