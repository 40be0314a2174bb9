"""Find the files of a source."""

import glob
import os
import re
from pathlib import Path

from mmkd.data.content import printable
from mmkd.errors import DataError

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "tar"}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
MOST_FILES = 100_000
MOST_DIGITS = 18  # most digits of a number in a range


def find_files(train: str) -> list[Path]:
    """The files that `train` names: one file, a glob, a range of shards such as
    `part-{0000..0009}.tar` (also of globs), or a folder of files of one kind.

    Raises:
        DataError: there is none.
    """
    # `Path.is_file` would raise OSError for names that are too long.
    if os.path.isfile(train):
        return [Path(train)]
    if os.path.isdir(train):
        return _in_folder(Path(train))
    return [file for name in _expand(train) for file in _matching(name)]


def _matching(name: str) -> list[Path]:
    if os.path.isfile(name):
        return [Path(name)]
    names = sorted(glob.glob(_below_folder(name), recursive=True))
    found = [Path(n) for n in names if os.path.isfile(n)]
    if not found:
        hint = "check data.train"
        if "://" in name:
            hint = "download it, or name a data set of the Hub: hub:OWNER/NAME"
        elif HUB_NAME.fullmatch(name) and Path(name).suffix not in KINDS:
            hint += f"; a data set of the Hub is hub:{name}"
        raise DataError("no such data file", where=name, hint=hint)
    return found


def _below_folder(name: str) -> str:
    """Escape the leading folders of a pattern if they exist, so that `a[1]/*.json` does not match
    `a1/*.json`."""
    parts = Path(name).parts
    for count in range(len(parts) - 1, 0, -1):
        if os.path.isdir(folder := os.path.join(*parts[:count])):
            return os.path.join(glob.escape(folder), *parts[count:])
    return name


def exact(file: Path) -> str:
    """Escape a file's name for `datasets`, which interprets names as patterns, URLs and archives.

    Raises:
        DataError: the name cannot be escaped.
    """
    name = str(file)
    if "::" in name or os.path.expandvars(str(file.absolute())) != str(file.absolute()):
        raise DataError(
            "a file's name with '::' or an environment variable in it",
            where=name,
            hint="rename it",
        )
    if glob.has_magic(name) or set(":~") & set(name):
        return glob.escape(str(file.absolute()))
    return name


def kind_of(files: list[Path], train: str) -> str:
    """The kind of files: json (also for JSON lines), parquet or tar.

    Raises:
        DataError: the kind is unknown, or there are several.
    """
    kinds = {KINDS.get(f.suffix, "") for f in files}
    if kinds == {""} or len(kinds) > 1:
        what = "unknown kind of data file" if "" in kinds else "data files of several kinds"
        raise DataError(what, where=train, hint=f"known: {', '.join(KINDS)}, one kind a source")
    return kinds.pop()


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.iterdir() if f.suffix in KINDS and f.is_file())
    if not found:
        raise DataError(
            "the folder holds no data files",
            where=str(folder),
            hint=f"put {', '.join(KINDS)} there, or name them: {folder}/**/*.parquet",
        )
    return found


def _expand(train: str) -> list[str]:
    """Expand ranges {first..last} of a pattern, with their leading zeros.

    Raises:
        DataError: a range is empty, or there would be too many files.
    """
    count = 1
    for first, last in RANGE.findall(train):
        many = max(len(first), len(last)) > MOST_DIGITS
        count *= MOST_FILES + 1 if many else int(last) - int(first) + 1
        if not 0 < count <= MOST_FILES:
            said = f"{max(count, 0):,}" if count <= MOST_FILES else f"more than {MOST_FILES:,}"
            raise DataError(
                f"{printable(f'{{{first}..{last}}}', 60)} names {said} files",
                where=printable(train),
                hint=f"at least one, at most {MOST_FILES:,} of all ranges together",
            )
    return _expanded(train)


def _expanded(train: str) -> list[str]:
    match = RANGE.search(train)
    if match is None:
        return [train]
    first, last = match.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = (str(n).zfill(width) for n in range(int(first), int(last) + 1))
    heads = (train[: match.start()] + n for n in numbers)
    tails = _expanded(train[match.end() :])
    return [head + tail for head in heads for tail in tails]
