"""Load a recipe's teachers: models that run in every step, or caches of their outputs."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.cache import Store
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import Objective
from mmkd.recipe import Recipe, StageConfig, TeacherConfig
from mmkd.runtime import distributed
from mmkd.students import converted_processor
from mmkd.teachers.assign import needed_teachers
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.placement import place_teacher
from mmkd.teachers.stored import StoredTeacher
from mmkd.teachers.teacher_set import Teacher, TeacherSet


@dataclass(frozen=True)
class LoadedTeachers:
    """The teachers that a stage needs.

    Attributes:
        members: by name, the primary one first. A teacher with `source: self` is not included; it
            is made for each stage.
        settings: the stage's teachers, the primary one first. If it is empty, each objective uses
            the first member.
        processor: the primary teacher's, or the student's for a cache or `source: self`; None if
            no teacher is needed.
    """

    members: Mapping[str, Teacher] = field(default_factory=dict)
    settings: Sequence[TeacherConfig] = ()
    processor: Any = None

    def primary_model(self, student: PreTrainedModel) -> PreTrainedModel | None:
        """The model of the primary teacher; None for a cache, or if no teacher is loaded.

        Args:
            student: is the teacher with `source: self`.
        """
        if self.settings and self.settings[0].source == "self":
            return student
        name = self.settings[0].name if self.settings else next(iter(self.members), "")
        teacher = self.members.get(name)
        return teacher.model if isinstance(teacher, LiveTeacher) else None

    def for_stage(
        self, objectives: Sequence[Objective], own: Callable[[], LiveTeacher]
    ) -> TeacherSet:
        """The teachers that a stage's objectives need.

        Args:
            objectives: of the stage, already copied for each teacher.
            own: makes a teacher from the student as it is before the stage.
        """
        names = [t.name for t in self.settings] or list(self.members)
        primary = names[0] if names else ""
        needed = {o.teacher or primary for o in objectives if "teacher" in o.needs}
        students = {t.name for t in self.settings if t.source == "self"}
        members = {n: own() if n in students else self.members[n] for n in names if n in needed}
        return TeacherSet(members, primary)


class TeacherPool:
    """The teachers of a run, of which only those that the current stage needs are in memory."""

    def __init__(self) -> None:
        self._loaded: dict[str, Teacher] = {}

    def for_stage(self, recipe: Recipe, stage: StageConfig) -> LoadedTeachers:
        """Load what a stage needs on its device, and release what it does not need. A teacher that
        the stage before has needed too stays where it is.

        Args:
            recipe: as the stage sees it (`with_stage_teachers`).
            stage: of the recipe.

        Raises:
            MmkdError: a teacher cannot be loaded.
        """
        needed = needed_teachers(recipe.teachers, stage.objectives)
        device = distributed.choose_device(stage.engine.device)
        keys: dict[str, str] = {}
        for teacher in (t for t in needed if t.source != "self"):
            key = _key(teacher, device)
            alike = sum(other.startswith(key) for other in keys.values())
            keys[teacher.name] = f"{key} {alike}"  # each teacher of a stage is a model of its own
        self._release({*self._loaded} - {*keys.values()})
        if not needed:
            return LoadedTeachers(settings=recipe.teachers)
        for teacher in needed:
            if (name := keys.get(teacher.name)) is not None and name not in self._loaded:
                self._loaded[name] = _load(teacher, device)
        members = {name: self._loaded[key] for name, key in keys.items()}
        live = needed[0].source == "live"
        processor = load_processor(needed[0]) if live else converted_processor(recipe.student)
        return LoadedTeachers(members, recipe.teachers, processor)

    def release(self) -> None:
        """Release all teachers, and what else is not used any more. `for_stage` loads teachers
        again."""
        self._release({*self._loaded})
        _free()

    def _release(self, keys: set[str]) -> None:
        for key in sorted(keys):  # processes release sharded weights in one order
            teacher = self._loaded.pop(key)
            if isinstance(teacher, LiveTeacher):
                teacher.close()
            del teacher
        if keys:
            _free()


def _free() -> None:
    gc.collect()  # modules and their hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_teachers(recipe: Recipe, stage: StageConfig) -> LoadedTeachers:
    """Load the teachers that a stage needs; arguments and errors as in `TeacherPool.for_stage`."""
    return TeacherPool().for_stage(recipe, stage)


def _key(teacher: TeacherConfig, device: torch.device) -> str:
    """Equal for teachers that are the same model at the same place."""
    other = {"name", "weight", "sources", "processor"}
    return f"{device} {teacher.model_dump_json(exclude=other)}"


def _load(teacher: TeacherConfig, device: torch.device) -> Teacher:
    if teacher.source == "cache":
        assert teacher.cache is not None
        return StoredTeacher(Store(Path(teacher.cache.folder)))
    return place_teacher(load_model(teacher), teacher.placement, device)
