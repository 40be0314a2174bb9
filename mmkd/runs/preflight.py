"""Checks of a recipe before a run writes its first file. Each check is in the module of its
feature."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mmkd.cache import Store
from mmkd.data.alignment import check_compared
from mmkd.data.chunks import check_chunks
from mmkd.data.first_records import check_records
from mmkd.data.microbatches import check_budget, check_contrast
from mmkd.data.packing import check_packed
from mmkd.engines.build import check_engine
from mmkd.engines.optim import check_schedule
from mmkd.evaluation.run import check as check_tasks
from mmkd.evaluation.samples import check_samples
from mmkd.making.opened import check_entry
from mmkd.making.used import (
    check_assistant,
    check_later,
    check_made,
    check_questions,
    made_for,
)
from mmkd.modeling.capture_exits import check_exits
from mmkd.modeling.image_token_checks import check_image_tokens
from mmkd.modeling.layer_checks import check_layers
from mmkd.modeling.layer_projections import attention_layers
from mmkd.objectives import build_objective
from mmkd.recipe import EvaluateConfig, Recipe, StudentConfig
from mmkd.recipe.context import StageContext
from mmkd.students import converted_processor, finished, student_at
from mmkd.students.check import check_student, check_trained
from mmkd.students.moe import check_experts
from mmkd.teachers.by_stage import earlier_stage, with_stage_teachers
from mmkd.teachers.check import (
    check_ensemble,
    check_further,
    check_quantized,
    check_sources,
    check_teacher,
)
from mmkd.teachers.reference import check_reference
from mmkd.teachers.stored import check_stored, open_store
from mmkd.training.domains import check_domains
from mmkd.training.objective_modules import check_own
from mmkd.training.on_policy import check_on_policy
from mmkd.training.trackers import check_trackers
from mmkd.training.validation_setup import check_validation
from mmkd_models.layout import mamba_layers

Check = Callable[[StageContext], None]
OF_SETTINGS: tuple[Check, ...] = (
    check_compared,
    check_stored,
    check_experts,
    check_layers,
    check_exits,
    check_own,
    check_trained,
    check_engine,
    check_budget,
    check_reference,
    check_chunks,
    check_packed,
    check_contrast,
    check_sources,
    check_ensemble,
    check_schedule,
    check_on_policy,
    check_image_tokens,
    check_questions,
)
OF_DATA: tuple[Check, ...] = (check_records, check_validation, check_domains)


def check(recipe: Recipe, *, data: bool = True, assistant: Recipe | None = None) -> None:
    """Check a recipe's models, data and objectives without loading weights.

    Args:
        recipe: the recipe of one student.
        data: also encode the first records; False if the data do not exist yet. Data that are made
            right before their stage are not read: `check_data`.
        assistant: the recipe of the teacher, if it is an assistant that is not trained yet.

    Raises:
        MmkdError: an error that would end a stage, such as an unknown parameter group or a first
            record that cannot be encoded.
    """
    check_trackers(recipe.report_to)
    check_later(recipe)
    if assistant is not None:
        check_assistant(recipe)
    if data:
        check_made(recipe)
    later = [made_for(recipe, index) for index in range(len(recipe.stages))]
    for name in dict.fromkeys(name for entries in later for name in entries):
        check_entry(recipe, name)
    for context, entries in zip(_stages(recipe, assistant), later, strict=True):
        check_stage(context, data=data and not entries)


def check_data(recipe: Recipe, index: int, *, assistant: Recipe | None = None) -> None:
    """Check the data of one stage, after they were made.

    Args:
        recipe: as the stage sees it (`with_stage_data`).
        index: of the stage, from 0.
        assistant: as in `check`.

    Raises:
        MmkdError: an error that would end the stage.
    """
    context = next(islice(_stages(recipe, assistant), index, None))
    for look in OF_DATA:
        look(context)


def check_stage(context: StageContext, *, data: bool = True) -> None:
    """Check a stage with its models, which may be on the meta device; arguments and errors as in
    `check`."""
    for look in OF_SETTINGS + (OF_DATA if data else ()):
        look(context)


def _stages(recipe: Recipe, assistant: Recipe | None) -> Iterator[StageContext]:
    """The stages in order. Their models and processors are checked before the first one."""
    processor = check_student(recipe.student)
    seen = [with_stage_teachers(recipe, stage) for stage in recipe.stages]
    keys = [_teachers_key(own) for own in seen]  # stages mostly have the same
    guides: dict[str, _Guide] = {}
    for stage, own, key in zip(recipe.stages, seen, keys, strict=True):
        if key not in guides:
            guides[key] = _guide(own, earlier_stage(recipe, stage), processor, assistant)
    check_quantized(recipe)
    for key, own in dict(zip(keys, seen, strict=True)).items():
        alike = [s for s, other in zip(recipe.stages, keys, strict=True) if other == key]
        check_further(own, alike, processor)
    for index, (stage, own, key) in enumerate(zip(recipe.stages, seen, keys, strict=True)):
        guide = guides[key]
        if index == 0 or stage.convert:
            student = student_at(recipe, index, meta=True)
            mamba, attention = mamba_layers(student.config), attention_layers(student)
        compared = student if guide.own else guide.model
        yield StageContext(
            recipe=own,
            stage=stage,
            objectives=[
                build_objective(
                    o,
                    mamba_layers=mamba,
                    attention_layers=attention,
                    teacher_attention_layers=attention_layers(compared) if compared else (),
                )
                for o in stage.objectives
            ],
            student=student,
            processor=processor,
            teacher=compared,
            teacher_processor=processor if guide.own else guide.processor,
            store=guide.store,
        )


@dataclass(frozen=True)
class _Guide:
    """The primary teacher of a stage, without weights.

    Attributes:
        model: on the meta device; None for a cache, none, or the student itself.
        processor: its processor, or None.
        store: its cache, or None.
        own: it is the student before the stage.
    """

    model: PreTrainedModel | None = None
    processor: Any = None
    store: Store | None = None
    own: bool = False


def _teachers_key(recipe: Recipe) -> str:
    """Equal for stages with the same teachers."""
    return json.dumps([t.model_dump(mode="json") for t in recipe.teachers])


def _guide(recipe: Recipe, earlier: int | None, processor: Any, assistant: Recipe | None) -> _Guide:
    """The primary teacher of a stage, checked.

    Args:
        recipe: as the stage sees it.
        earlier: index of the stage whose student is the teacher, or None.
        processor: of the student.
        assistant: as in `check`.
    """
    teacher = recipe.teacher
    if teacher is None:
        return _Guide()
    if teacher.source == "self":
        return _Guide(own=True)
    if teacher.source == "cache":
        return _Guide(store=open_store(teacher, processor))
    if earlier is not None:
        return _Guide(student_at(recipe, earlier, meta=True), processor)
    if assistant is not None:
        return _Guide(finished(assistant), converted_processor(assistant.student))
    return _Guide(*check_teacher(teacher, "teacher"))


def check_evaluation(settings: EvaluateConfig, student: StudentConfig) -> None:
    """Check that the evaluation's tasks can be run and that all sample questions can be asked.

    Raises:
        MmkdError: an error that would end the evaluation after the training.
    """
    if settings.tasks:
        include, local = (Path(f) if f else None for f in (settings.include, settings.local))
        check_tasks(settings.tasks, include, local, settings.limit)
    if settings.samples is not None:
        check_samples(settings.samples, converted_processor(student))
