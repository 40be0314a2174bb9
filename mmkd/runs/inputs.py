"""Notes of what a stage reads from the disk, so that it resumes with the same inputs only.

<stage>/inputs.json
  files     {path: {bytes, sha256, stamp}}: data, some of their images, models, processors
  sources   {data source: its files}
  caches    {folder: {what: checksum}}: of a teacher's cache the settings and each shard
  commits   {Hub id of a model, or data source: commit}

A file is not read again if its size and stamp (modification time, change time, inode) are as noted.
Data files and models are read whole. Of a tar file larger than `WHOLE_BYTES`, pieces are read. Of
images in separate files, those of `reads.PICTURES` records are read, evenly spread over the
source. Of data sets and models from the Hub, the commits are noted.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError
from mmkd.recipe import ModelConfig
from mmkd.runs.members import Member
from mmkd.runs.reads import Reads, forget_sources, names_of, reads_of, reads_of_stage
from mmkd.runs.resume import Restart
from mmkd.runtime import distributed
from mmkd.runtime.files import read_json, write_json
from mmkd.runtime.hashes import file_hash, remember
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import REPLACED, StudentFolder

FORMAT = 1
WHOLE_BYTES = 2**30
PIECES, PIECE_BYTES = 1_000, 2**16

Notes = dict[str, dict[str, Any]]
"""What inputs.json holds: by section, facts by name."""


def check_inputs(
    todo: Sequence[Member], restarts: Sequence[Restart | None], from_stage: str | None
) -> list[Restart | None]:
    """Compare the inputs of unfinished stages with the inputs that the run began with.

    All ranks must call it. Rank 0 reads the files.

    Args:
        todo: the run's members.
        restarts: for each member, where it starts again because the recipe has changed, or None.
        from_stage: from this stage on, changed inputs are allowed; its earlier work is replaced.

    Returns:
        For each member, where it starts again, or None.

    Raises:
        CheckpointError: an input has changed; raised on all ranks.
    """
    said: list[str] = []
    forget_sources()
    if distributed.rank() == 0:
        try:
            found = [_check(m, r, todo, restarts, from_stage) for m, r in _pairs(todo, restarts)]
            said = [json.dumps([found, None])]
        except CheckpointError as error:
            said = [json.dumps([[], [error.what, error.where, error.hint]])]
    found, problem = json.loads(distributed.gather(said)[0])
    if problem is not None:
        what, where, hint = problem
        raise CheckpointError(what, where=where, hint=hint)
    return [_again(m, r, f) for (m, r), f in zip(_pairs(todo, restarts), found, strict=True)]


def _pairs(
    todo: Sequence[Member], restarts: Sequence[Restart | None]
) -> list[tuple[Member, Restart | None]]:
    return list(zip(todo, restarts, strict=True))


def _again(member: Member, restart: Restart | None, found: list[Any] | None) -> Restart | None:
    if found is None:
        return restart
    index, names = found
    stages = [s.name for s in member.recipe.stages]
    keys = names if restart is None else [*restart.keys, *names]
    return Restart(member, index, stages[index], keys, stages, True)


def _check(
    member: Member,
    restart: Restart | None,
    todo: Sequence[Member],
    restarts: Sequence[Restart | None],
    from_stage: str | None,
) -> list[Any] | None:
    """The stage that a member starts again from because its inputs have changed, and which have."""
    names = [s.name for s in member.recipe.stages]
    kept = len(names) if restart is None else restart.index
    allowed = names.index(from_stage) if from_stage in names else len(names)
    changed: list[str] = []
    for index, folder in enumerate(member.stages):
        begun, done = index < kept and folder.is_begun(), folder.done.exists()
        if (done and index < kept and index < allowed) or (not begun and index >= allowed):
            continue
        if begun:
            difference = _since(folder, member, index)
        else:
            difference = _beside(member, index, todo, restarts)
        if difference is None:
            continue
        if index < allowed:
            raise _refusal(difference, names[index])
        changed.append(difference[0])
    return [allowed, changed[:3]] if changed else None


def _refusal(difference: tuple[str, str], stage: str) -> CheckpointError:
    where, what = difference
    return CheckpointError(
        f"{what} (stage {stage})",
        where=where,
        hint=f"bring it back as it was, or train the stage with the change: "
        f"`mmkd run RECIPE --from-stage {stage}`, which moves its earlier work to {REPLACED}/",
    )


def _since(folder: StudentFolder, member: Member, index: int) -> tuple[str, str] | None:
    """An input that has changed since a stage began, and how."""
    notes = read_notes(folder)
    if notes is None:
        say(
            f"{member.label}: an earlier version of mmkd began stage {folder.path.name} and did "
            "not note its inputs: whether its data and models have changed cannot be checked"
        )
        return None
    now = reads_of_stage(member, index)
    if (found := _differing(notes, now)) is not None:
        return found
    new = sorted(set(now.files) - set(notes["files"]))
    return (new[0], "it did not exist when the run began") if new else None


def _beside(
    member: Member, index: int, todo: Sequence[Member], restarts: Sequence[Restart | None]
) -> tuple[str, str] | None:
    """An input of a stage that has changed since another stage of the run read it, and how."""
    others = [*todo, member]  # the member's own notes count before those of others
    limits = {m.label: None if r is None else r.index for m, r in _pairs(todo, restarts)}
    merged: Notes = {"files": {}, "sources": {}, "caches": {}, "commits": {}}
    for other in others:
        folders = [other.folder.start, *other.stages]
        last = index + 1 if other is member else len(folders)
        limit = limits[other.label]
        kept = folders[: last if limit is None else min(last, limit + 1)]
        for notes in map(read_notes, (f for f in kept if f.is_begun())):
            for section, facts in (notes or {}).items():
                merged[section] |= facts
    if not any(merged.values()):
        return None
    now = reads_of_stage(member, index)
    return _differing(merged, now, only_read=True)


def _differing(notes: Notes, now: Reads, *, only_read: bool = False) -> tuple[str, str] | None:
    """The first input that differs from its notes, and the difference; None if all are equal."""
    changed = "it has changed since the run began"
    for name, files in notes["sources"].items():
        if name in now.sources and now.sources[name] != files:
            return name, "it matches other files than when the run began"
    for name, facts in notes["files"].items():
        if only_read and name not in now.files:
            continue
        path = Path(name)
        if not path.is_file():
            return name, "it is missing, and the run began with it"
        if not _is_same(path, facts):
            return name, changed
    for name, sums in notes["caches"].items():
        new = now.caches.get(name) or {}
        if any(new[what] != checksum for what, checksum in sums.items() if what in new):
            return name, changed
    for name, commit in notes["commits"].items():
        if now.commits.get(name, commit) != commit:
            return name, f"{changed} with commit {commit}"
    return None


# Facts


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _is_same(path: Path, facts: dict[str, Any]) -> bool:
    if path.stat().st_size != facts.get("bytes"):
        return False
    if _stamp(path) != facts.get("stamp"):
        return bool(_facts(path)["sha256"] == facts.get("sha256"))
    if not _in_pieces(path) and isinstance(facts.get("sha256"), str):
        remember(path, facts["sha256"])  # provenance wants it too
    return True


def _facts(path: Path) -> dict[str, Any]:
    size, stamp = path.stat().st_size, _stamp(path)
    content = _pieces_hash(path, size, tuple(stamp)) if _in_pieces(path) else file_hash(path)
    return {"bytes": size, "sha256": content, "stamp": stamp}


def _in_pieces(path: Path) -> bool:
    """Whether a file is too large to be read whole."""
    return path.suffix == ".tar" and path.stat().st_size > WHOLE_BYTES


@cache
def _pieces_hash(path: Path, size: int, stamp: tuple[int, ...]) -> str:
    # Members of a run have most inputs in common.
    seen = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(PIECES):
            file.seek(number * (size - PIECE_BYTES) // (PIECES - 1))
            seen.update(file.read(PIECE_BYTES))
    return seen.hexdigest()


def read_notes(folder: StudentFolder) -> Notes | None:
    """The notes in a folder of a run; None if its student was begun without notes.

    Raises:
        CheckpointError: inputs.json is damaged.
    """
    path = folder.inputs
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        notes = {name: found[name] for name in ("files", "sources", "caches", "commits")}
        sound = all(isinstance(v, dict) for v in [*notes.values(), *notes["files"].values()])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(
            "it is damaged and no longer lists what the stage began with",
            where=str(path),
            hint="bring it back, or delete it to continue without this check",
        )
    return notes


def note_inputs(member: Member, index: int) -> None:
    """Write the notes of a stage before it begins. Existing notes are kept.

    Args:
        member: the run's member that the stage belongs to.
        index: number of the stage, from 0.
    """
    folder = member.stages[index]
    if folder.is_begun() and folder.inputs.is_file():
        return
    _write(folder, reads_of_stage(member, index))


def note_start(member: Member) -> None:
    """Write the notes of the model that the run's first student is made from."""
    first = reads_of(member.recipe, 0, member.recipe.student)
    models = frozenset(n for n in first.files if _is_of(n, member.recipe.student))
    _write(member.folder.start, replace(first, files=models, sources={}, caches={}))


def _is_of(name: str, model: ModelConfig) -> bool:
    named = {str(Path(m)) for m in names_of(model)}
    return not named.isdisjoint({name, str(Path(name).parent)})


def _write(folder: StudentFolder, reads: Reads) -> None:
    files = {n: _facts(Path(n)) for n in sorted(reads.files) if Path(n).is_file()}
    said = {"files": files, "sources": reads.sources, "caches": reads.caches}
    write_json(folder.inputs, {"format": FORMAT, **said, "commits": reads.commits})
