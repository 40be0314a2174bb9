"""From what a recipe says of a source to its files."""

import glob
import re
from pathlib import Path

from mmkd.errors import DataError

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "tar"}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
MOST_FILES = 100_000


def find_files(train: str) -> list[Path]:
    """The files that `train` names: one file, a glob, a range of shards such as
    `part-{0000..0009}.tar` (also of globs), or a folder of files of one kind.

    Raises:
        DataError: there is none.
    """
    path = Path(train)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path)
    return [file for name in _expand(train) for file in _matching(name)]


def _matching(name: str) -> list[Path]:
    if Path(name).is_file():
        return [Path(name)]
    found = [Path(n) for n in sorted(glob.glob(name, recursive=True)) if Path(n).is_file()]
    if not found:
        mend = "check data.train"
        if "://" in name:
            mend = "download it, or name a data set of the Hub: hub:OWNER/NAME"
        elif HUB_NAME.fullmatch(name) and Path(name).suffix not in KINDS:
            mend += f"; a data set of the Hub is hub:{name}"
        raise DataError("no such data file", where=name, mend=mend)
    return found


def kind_of(files: list[Path], train: str) -> str:
    """json, parquet or tar; json of JSON lines too.

    Raises:
        DataError: another kind, or several.
    """
    kinds = {KINDS.get(f.suffix, "") for f in files}
    if kinds == {""} or len(kinds) > 1:
        what = "unknown kind of data file" if "" in kinds else "data files of several kinds"
        raise DataError(what, where=train, mend=f"known: {', '.join(KINDS)}, one kind a source")
    return kinds.pop()


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.iterdir() if f.suffix in KINDS and f.is_file())
    if not found:
        raise DataError(
            "the folder holds no data files",
            where=str(folder),
            mend=f"put {', '.join(KINDS)} there, or name them: {folder}/**/*.parquet",
        )
    return found


def _expand(train: str) -> list[str]:
    """Every name of a pattern with {first..last}, zeros in front kept."""
    match = RANGE.search(train)
    if match is None:
        return [train]
    first, last = match.groups()
    count = int(last) - int(first) + 1
    if not 0 < count <= MOST_FILES:
        raise DataError(
            f"{{{first}..{last}}} names {max(count, 0):,} files",
            where=train,
            mend=f"at least one, at most {MOST_FILES:,}",
        )
    width = len(first) if first.startswith("0") else 0
    numbers = (str(n).zfill(width) for n in range(int(first), int(last) + 1))
    heads = (train[: match.start()] + n for n in numbers)
    return [head + tail for head in heads for tail in _expand(train[match.end() :])]
