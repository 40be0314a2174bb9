"""What is released: one finished student of a run, and what the run says of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError, RecipeError
from mmkd.recipe import Recipe, load_written
from mmkd.report.rundata import MemberLog, Run, read_run
from mmkd.report.use import needs_code
from mmkd.report.weights import other_weights
from mmkd.runtime.run_folder import TEACHER

GO_ON = "run its recipe again: it goes on where it stopped"


@dataclass(frozen=True)
class Source:
    """A finished student.

    Attributes:
        student: its folder.
    """

    run: Run
    member: MemberLog
    student: Path

    @property
    def name(self) -> str:
        return str(self.run.recipe["name"])

    @cached_property
    def recipe(self) -> Recipe:
        """What was trained, with the run's evaluation."""
        return load_written({**self.member.recipe, "evaluate": self.run.recipe.get("evaluate")})

    @cached_property
    def taught(self) -> bool:
        """Some stage learned from the teacher."""
        objectives = [o for stage in self.recipe.stages for o in stage.objectives]
        return any("teacher" in o.needs for o in objectives)

    @cached_property
    def needs_code(self) -> bool:
        """The student's classes are not in transformers. Their code is released with it."""
        return needs_code(self.student)

    @property
    def results(self) -> dict[str, Any] | None:
        """What its results.json holds."""
        return self.run.results.get(self.member.label)

    def check_scores(self) -> None:
        """Refuse scores of other weights than the run holds: the card would publish them.

        Raises:
            CheckpointError: a student's or the teacher's scores are of other weights.
        """
        labels = [TEACHER, *(m.label for m in self.run.members if m.group == self.member.group)]
        for label in other_weights(self.run):
            if label in labels:
                raise CheckpointError(
                    "its scores are of other weights than the run holds now",
                    where=str(self.run.folder.evaluation(label).path),
                    hint="run its recipe again, which scores them, or delete that folder",
                )

    def on_hub(self, model: str) -> bool:
        """The model came from the Hub, not from a folder."""
        return self.run.provenance.get("models", {}).get(model) == "Hub"


def choose(folder: Path, label: str | None = None, seed: int | None = None) -> Source:
    """The student of a run's folder to release.

    Args:
        label: the recipe's label or a variant's; the recipe's if None.
        seed: the recipe's first if None.

    Raises:
        CheckpointError: the folder holds no run, or the student is not finished.
        RecipeError: the run has no such student.
    """
    run = read_run(folder)
    label = label or str(run.recipe.get("label", "student"))
    seeds = [member.seed for member in run.members if member.group == label]
    if not seeds:
        raise RecipeError(
            f"the run has trained no student {label!r}",
            where=str(folder),
            hint=f"it has {', '.join(run.groups)}" if run.groups else GO_ON,
        )
    if seed is None:
        seed = int((run.recipe.get("seeds") or [run.recipe["seed"]])[0])
    if seed not in seeds:
        raise RecipeError(
            f"the run has trained no {label} with seed {seed}",
            where=str(folder),
            hint=f"its seeds: {', '.join(map(str, seeds))}",
        )
    member = next(m for m in run.members if (m.group, m.seed) == (label, seed))
    return Source(run, member, _finished(member, folder))


def _finished(member: MemberLog, folder: Path) -> Path:
    """The folder that the member's last stage wrote."""
    open_stages = [stage.name for stage in member.stages if not stage.done]
    if open_stages:
        raise CheckpointError(
            f"{member.label} is not finished: stage {open_stages[0]}",
            where=str(folder),
            hint=GO_ON,
        )
    student = member.finished_student
    if student is None or not any(student.glob("*.safetensors")):
        raise CheckpointError(
            f"the student of stage {member.last.path.name} is gone",
            where=str(folder),
            hint="bring its folder back, or train it again under another name",
        )
    return student
