"""Find scores of a run that do not belong to its current weights."""

from pathlib import Path

from mmkd.report.rundata import Run
from mmkd.runtime.hashes import weights_hash
from mmkd.runtime.run_folder import TEACHER, EvaluationFolder
from mmkd.runtime.shapes import Shape, read_if


def other_weights(run: Run) -> list[str]:
    """Labels of the models whose scores do not belong to the run's current weights.

    Models without weights on this machine, and evaluations without a checksum of the weights, are
    left out.
    """
    return [label for label, folder in _models(run).items() if _differ(run, label, folder)]


def _models(run: Run) -> dict[str, Path]:
    """The folder of each model that has scores."""
    found = {m.label: m.student for m in run.members}
    for member in run.members:
        folders = member.stage_folders
        found |= {f"{member.label}@{name}": folder.student for name, folder in folders.items()}
    teacher = run.recipe.get("teacher") or {}
    if run.teacher is not None and teacher.get("model"):
        found[TEACHER] = run.find(str(teacher["model"]))
    return {k: path for k, path in found.items() if k in run.results and path is not None}


def _differ(run: Run, label: str, folder: Path) -> bool:
    scored = run.results[label].get("weights") or _requested(run.folder.evaluation(label))
    held = weights_hash(folder)
    return None not in (scored, held) and scored != held


def _requested(folder: EvaluationFolder) -> str | None:
    """Checksum of the weights that an evaluation has scored; None if it is not known."""
    return (read_if(Shape, folder.request) or {}).get("weights")
