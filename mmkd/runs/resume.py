"""Decide which stages of a run are kept if its recipe has changed.

A stage is kept, finished or not, if it and all stages before it are equal in the recipe of the
folder. The run starts again from the first stage that has changed:

<member>/replaced/N/     earlier work, with the files that describe it
  training.yaml  recipe.yaml  provenance.json  report.html
  02-<stage>/ ...  evaluation/<label>/ ...  release/<label>/  tensorboard/02-<stage>/
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError, RecipeError, nearest
from mmkd.making.state import SERVER_KEYS
from mmkd.making.used import used_entries
from mmkd.recipe import Recipe, load_written, to_yaml
from mmkd.runs.members import Member, run_folder
from mmkd.runtime.files import read_yaml, write_json, write_text
from mmkd.runtime.run_folder import REPLACED, MemberFolder, RunFolder, StageFolder
from mmkd.runtime.shapes import Provenance, read_if

LAYOUT = ("engine", "batch", "checkpoint", "activation_checkpointing")
"""Keys of a stage that may change while it is not finished. The number of records per step must not
change, which is checked when a checkpoint is loaded."""


@dataclass(frozen=True)
class Restart:
    """The stage from which a member starts again.

    Attributes:
        member: with the current recipe.
        index: of the first stage that is not kept; the number of stages if the last stages were
            removed.
        stage: its name; its old name if it was removed.
        keys: dotted keys in which the recipes differ.
        names: of the stages in the old recipe.
        begun: stages that are not kept have work already.
    """

    member: Member
    index: int
    stage: str
    keys: list[str]
    names: list[str]
    begun: bool

    @property
    def folders(self) -> list[StageFolder]:
        """Folders of the stages that are not kept."""
        return self.member.folder.stages_from(self.index)

    def __str__(self) -> str:
        kept = ", ".join(self.names[: self.index])
        keys = ", ".join(self.keys)
        said = f"{self.member.label}: starts again from stage {self.stage}, which differs in {keys}"
        return said + (f"; {kept} kept" if kept else "")


def find_restart(member: Member, from_stage: str | None = None) -> Restart | None:
    """Find the stage from which a member must start again; None if all stages are kept.

    Args:
        member: with the current recipe.
        from_stage: the first stage whose work may be replaced.

    Raises:
        RecipeError: the folder has a run of another recipe, or replacing work was not allowed; with
            the keys that differ.
        CheckpointError: the recipe in the folder is damaged.
    """
    folder = member.folder
    path = folder.training
    if not path.exists() or not folder.is_started():
        return None
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise CheckpointError(
            "it is damaged (not a mapping)",
            where=str(path),
            hint="bring the file back, or delete the run's folder",
        )
    try:
        old = load_written(raw)  # keys that were added since then have their defaults
    except RecipeError as error:
        new_raw = member.recipe.model_dump(mode="json")
        raise _another(folder, _differences(raw, {**raw, **new_raw})) from error
    new = member.recipe
    said = [_whole(r.model_dump(mode="json")) for r in (old, new)]
    if keys := _differences(said[0], said[1]):
        raise _another(folder, keys)
    stages = [[_effective(r, i) for i in range(len(r.stages))] for r in (old, new)]
    same = [a == b for a, b in zip(*stages, strict=False)]
    index = same.index(False) if False in same else len(same)
    if index == len(old.stages) == len(new.stages):
        return None
    keys = _changed_keys(old, new, index)
    names = [s.name for s in old.stages]
    index = _allowed(index, keys, from_stage, new, names)
    name = (new.stages[index:] or old.stages[index:])[0].name
    found = Restart(member, index, name, keys, names, False)
    found = Restart(member, index, name, keys, names, any(f.is_begun() for f in found.folders))
    if found.begun and from_stage is None:
        raise _another(folder, keys, found)
    return found


def _allowed(
    index: int, keys: list[str], from_stage: str | None, recipe: Recipe, old: list[str]
) -> int:
    """The stage to start from, if `index` is the first one that has changed."""
    if from_stage is None:
        return index
    names = [s.name for s in recipe.stages]
    names += old[len(names) :]
    where = f"--from-stage {from_stage}"
    if from_stage not in names:
        raise RecipeError("no such stage", where=where, hint=nearest(from_stage, names))
    if (wanted := names.index(from_stage)) > index:
        raise RecipeError(
            f"stage {names[index]} before it has changed too, in {', '.join(keys)}",
            where=where,
            hint=f"give --from-stage {names[index]}, or change it back",
        )
    return wanted


def check_stage(
    from_stage: str | None, todo: Sequence[Member], restarts: Sequence[Restart | None]
) -> None:
    """Refuse an unknown name of a stage, if nothing has changed either.

    Raises:
        RecipeError: there is no such stage.
    """
    names = [stage.name for member in todo for stage in member.recipe.stages]
    if from_stage is not None and from_stage not in names and not any(restarts):
        raise RecipeError(
            "no such stage",
            where=f"--from-stage {from_stage}",
            hint=nearest(from_stage, list(dict.fromkeys(names))),
        )


def _another(
    folder: MemberFolder, keys: Sequence[str], restart: Restart | None = None
) -> RecipeError:
    hint = "give the run another name, or delete the folder"
    if restart is not None:
        kept = ", ".join(restart.names[: restart.index])
        hint = (
            f"`mmkd run RECIPE --from-stage {restart.stage}` "
            + (f"keeps {kept}, starts again from there" if kept else "starts again from there")
            + f" and moves the old work to {REPLACED}/; or give the run another name"
        )
    what = f"the folder has a run of another recipe, which differs in {', '.join(keys)}"
    if restart is not None:
        what += f" (stage {restart.stage})"
    return RecipeError(what, where=str(folder.path), hint=hint)


def _whole(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings outside of stages, without the data, which a stage may override, without what
    makes data, and without the evaluation."""
    parts = ("stages", "data", "make", "servers", "report_to", "evaluate")
    return {k: v for k, v in recipe.items() if k not in parts}


def _effective(recipe: Recipe, index: int) -> dict[str, Any]:
    """The settings that determine a stage's result, in addition to those of `_whole`."""
    stage = recipe.stages[index]
    said = stage.model_dump(mode="json", exclude=set(LAYOUT))
    data = recipe.stage_data(stage)
    made = used_entries(recipe, [data])
    asked = {name for entry in made.values() for name in entry.models}
    return {
        **said,
        "data": data.model_dump(mode="json"),
        "make": {n: m.model_dump(mode="json", exclude={"batch_size"}) for n, m in made.items()},
        "servers": {
            name: server.model_dump(mode="json", include=SERVER_KEYS)
            for name, server in recipe.servers.items()
            if name in asked
        },
    }


def _changed_keys(old: Recipe, new: Recipe, index: int) -> list[str]:
    """At most three dotted keys in which stage `index` differs."""
    if index in (len(old.stages), len(new.stages)):
        return [f"stages.{index}"]
    keys = _differences(_effective(old, index), _effective(new, index))
    inherited = old.stages[index].data is None and new.stages[index].data is None
    at = f"stages.{index}."
    outside = ("make.", "servers.", *(["data."] if inherited else []))
    return [k if k.startswith(outside) else at + k for k in keys]


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """At most three dotted keys in which two recipes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(k, a.get(k), b.get(k)) for k in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [path] if a != b else []
    inner = [d for k, x, y in pairs for d in _differences(x, y, f"{path}.{k}" if path else k)]
    return inner[:3]


def start_again(restart: Restart) -> Path:
    """Move the stages that are not kept to `replaced/N`, with their scores, report, release and
    charts, which do not belong to the new student. Only one process may call it.

    If it is killed, nothing is lost: the same command moves the rest.

    Returns:
        The new folder.
    """
    member, run = restart.member, run_folder(restart.member.recipe)
    earlier = member.folder.replaced
    taken = [int(f.name) for f in earlier.glob("*") if re.fullmatch(r"\d+", f.name)]
    target = earlier / str(max(taken, default=0) + 1)
    target.mkdir(parents=True)
    shutil.copy2(member.folder.training, target)
    for path in (run.recipe, run.provenance):
        if path.exists():
            shutil.copy2(path, target)
    labels = [member.label, *(f"{member.label}@{name}" for name in restart.names[restart.index :])]
    moved = RunFolder(target)
    inside = member.folder.path.relative_to(run.path)
    for label in labels:
        _move(run.evaluation(label).path, moved.evaluation(label).path)
    _move(run.report, moved.report)
    _move(run.release(member.label), moved.release(member.label))
    for folder in reversed(restart.folders):
        name = folder.path.name
        _move(run.tensorboard / inside / name, moved.tensorboard / name)
        _move(folder.path, target / name)
    _note(run, restart, target)
    write_text(member.folder.training, to_yaml(member.recipe))
    return target


def _move(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def _note(run: RunFolder, restart: Restart, target: Path) -> None:
    """Add replaced and kept stages to the run's provenance."""
    path = run.provenance
    found = read_if(Provenance, path) or {}
    said = {
        "member": restart.member.label,
        "from_stage": restart.stage,
        "differs_in": restart.keys,
        "kept_stages": restart.names[: restart.index],
        "folder": target.relative_to(run.path).as_posix(),
        "provenance": {k: v for k, v in found.items() if k != REPLACED},
    }
    write_json(path, {REPLACED: [*found.get(REPLACED, []), said]})
