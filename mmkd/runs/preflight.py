"""Checks of a recipe before a run writes its first file. Each check is in the module of its
feature."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mmkd.data.alignment import check_compared
from mmkd.data.chunks import check_chunks
from mmkd.data.first_records import check_records
from mmkd.data.microbatches import check_budget, check_contrast
from mmkd.data.packing import check_packed
from mmkd.engines.build import check_engine
from mmkd.engines.optim import check_schedule
from mmkd.evaluation.run import check as check_tasks
from mmkd.evaluation.samples import check_samples
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
from mmkd.teachers.check import check_ensemble, check_further, check_quantized, check_teacher
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
    check_ensemble,
    check_schedule,
    check_on_policy,
    check_image_tokens,
)
OF_DATA: tuple[Check, ...] = (check_records, check_validation, check_domains)


def check(recipe: Recipe, *, data: bool = True, assistant: Recipe | None = None) -> None:
    """Check a recipe's models, data and objectives without loading weights.

    Args:
        recipe: the recipe of one student.
        data: also encode the first records; False if the data do not exist yet.
        assistant: the recipe of the teacher, if it is an assistant that is not trained yet.

    Raises:
        MmkdError: an error that would end a stage, such as an unknown parameter group or a first
            record that cannot be encoded.
    """
    check_trackers(recipe.report_to)
    for context in _stages(recipe, assistant):
        check_stage(context, data=data)


def check_stage(context: StageContext, *, data: bool = True) -> None:
    """Check a stage with its models, which may be on the meta device; arguments and errors as in
    `check`."""
    for look in OF_SETTINGS + (OF_DATA if data else ()):
        look(context)


def _stages(recipe: Recipe, assistant: Recipe | None) -> Iterator[StageContext]:
    """The stages in order. Their models and processors are checked before the first one."""
    processor = check_student(recipe.student)
    teacher = teacher_processor = store = None
    own = recipe.teacher is not None and recipe.teacher.source == "self"
    if recipe.teacher is not None and recipe.teacher.source == "cache":
        store = open_store(recipe.teacher, processor)
    elif assistant is not None:
        teacher, teacher_processor = finished(assistant), converted_processor(assistant.student)
    elif recipe.teacher is not None and not own:
        teacher, teacher_processor = check_teacher(recipe.teacher, "teacher")
    check_quantized(recipe)
    check_further(recipe, processor)
    for index, stage in enumerate(recipe.stages):
        if index == 0 or stage.convert:
            student = student_at(recipe, index, meta=True)
            mamba, attention = mamba_layers(student.config), attention_layers(student)
        compared = student if own else teacher
        yield StageContext(
            recipe=recipe,
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
            teacher_processor=processor if own else teacher_processor,
            store=store,
        )


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
