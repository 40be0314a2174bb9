"""Checks of a recipe before a run writes its first file."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mmkd.cache import Store, processor_hash
from mmkd.data.alignment import ALIGNED, same_processor
from mmkd.data.chat import prompt_ends_in_blank
from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture
from mmkd.data.templates import check_processor
from mmkd.data.vocabulary import check_head, shared_vocabulary
from mmkd.engines.deepspeed_config import resolve
from mmkd.engines.precision import check_dtype
from mmkd.errors import CheckpointError, RecipeError
from mmkd.evaluation.run import check as check_tasks
from mmkd.evaluation.samples import check_samples
from mmkd.modeling.adapters import targets as adapter_targets
from mmkd.modeling.capture import check_supported
from mmkd.modeling.loading import check_quantization, load_processor, skeleton
from mmkd.objectives import CrossEntropy, Objective, Preference, build_objective
from mmkd.recipe import DataConfig, EvaluateConfig, ModelConfig, Recipe, StageConfig
from mmkd.runs.preflight_layers import check_layers
from mmkd.runtime import distributed
from mmkd.runtime.hashes import weights_hash
from mmkd.runtime.progress import say_once
from mmkd.students import check_groups, convert
from mmkd.teachers import ask_each, check_storable
from mmkd.training.trackers import check_trackers
from mmkd.training.validation import build_validation, check_held_out
from mmkd_models.layout import mamba_layers, moe_layers


def check(recipe: Recipe, *, data: bool = True) -> None:
    """Check a recipe's models, data and objectives without loading weights.

    Args:
        recipe: the recipe of one student.
        data: encode the first records too; False if the data do not exist yet.

    Raises:
        MmkdError: an error that would end a stage, from an unknown group of parameters to a first
            record that cannot be encoded.
    """
    check_trackers(recipe.report_to)
    processor = load_processor(recipe.student)
    student = _check_student(recipe, processor)
    teacher = teacher_processor = store = None
    if recipe.teacher is not None and recipe.teacher.source == "cache":
        store = _check_store(recipe, processor)
    elif recipe.teacher is not None and recipe.teacher.source == "self":
        teacher, teacher_processor = student, processor
    elif recipe.teacher is not None:
        teacher = skeleton(recipe.teacher)
        teacher_processor = load_processor(recipe.teacher)
        check_supported(teacher, "teacher")
        check_head(teacher, teacher_processor.tokenizer, "teacher")
    _check_quantized(recipe)
    _check_others(recipe, processor)
    for stage in recipe.stages:
        convert(student, stage.convert)
        mamba = mamba_layers(student.config)
        objectives = [build_objective(o, mamba_layers=mamba) for o in stage.objectives]
        if store is None:
            _check_teacher(stage, objectives, processor, teacher_processor)
        else:
            _check_stored(recipe, stage, objectives, store)
        _check_experts(stage, objectives, student)
        if teacher is not None:
            check_layers(recipe, stage, objectives, student, teacher)
        _check_trained(stage, student)
        _check_engine(stage, recipe.student.dtype)
        _check_budget(stage, recipe.stage_data(stage))
        _check_reference(stage, objectives)
        _check_chunks(recipe, stage, objectives)
        _check_packing(stage, objectives, processor, teacher_processor)
        _check_contrast(stage, objectives)
        _check_schedule(stage)
        _check_on_policy(stage, objectives)
        if data:
            _check_data(recipe, stage, objectives, processor, teacher_processor, store)


def _check_student(recipe: Recipe, processor: Any) -> PreTrainedModel:
    """The student without weights, as it is before its first stage."""
    student = skeleton(recipe.student)
    check_supported(student, "student")
    check_head(student, processor.tokenizer, "student")
    check_processor(processor)
    if prompt_ends_in_blank(processor) and distributed.rank() == 0:
        say_once(
            "student: the chat template's generation prompt ends in a space. In training, that "
            "space is part of the answer's first token, so the student may begin its answers in "
            "another way than it was trained to -- remove the space from the generation prompt"
        )
    convert(student, recipe.student.convert)
    return student


def _check_quantized(recipe: Recipe) -> None:
    """This machine can load quantized teachers."""
    for teacher in recipe.teachers:
        if teacher.quantize is not None and teacher.source == "live":
            device = distributed.choose_device(recipe.stages[0].engine.device)
            check_quantization(teacher.quantize, f"teacher {teacher.name}: quantize", device)


def _check_others(recipe: Recipe, processor: Any) -> None:
    """Further teachers have the student's processor, and the data have the sources they name."""
    for teacher in recipe.more_teachers:
        where = f"teacher {teacher.name}"
        model, own_processor = skeleton(teacher), load_processor(teacher)
        check_supported(model, where)
        check_head(model, own_processor.tokenizer, where)
        if not same_processor(processor, own_processor):
            raise RecipeError(
                "of several teachers, all but the first need the student's processor",
                where=where,
                mend="put it first, or leave it out",
            )
    for stage in recipe.stages:
        ask_each([], recipe.teachers, recipe.stage_data(stage))


def check_evaluation(settings: EvaluateConfig, student: ModelConfig) -> None:
    """Check that the evaluation's tasks can be run and that all sample questions can be asked.

    Raises:
        MmkdError: an error that would end the evaluation after the training.
    """
    if settings.tasks:
        include, local = (Path(f) if f else None for f in (settings.include, settings.local))
        check_tasks(settings.tasks, include, local, settings.limit)
    if settings.samples is not None:
        check_samples(settings.samples, load_processor(student))


def _check_engine(stage: StageConfig, dtype: str) -> None:
    check_dtype(dtype, stage, distributed.choose_device(stage.engine.device))
    stage.batch.records_per_step(distributed.world_size())
    if stage.engine.kind == "deepspeed":
        resolve(stage)


def _check_trained(stage: StageConfig, student: PreTrainedModel) -> None:
    """The student has the groups that train, and layers for adapters."""
    lora = stage.train.lora
    check_groups(student, stage.train.groups, lora)
    if lora is not None:
        adapter_targets(student, lora, stage.train.groups)


def _check_budget(stage: StageConfig, data: DataConfig) -> None:
    """A micro-batch has room for the longest record."""
    tokens = stage.batch.tokens
    if tokens is not None and tokens < data.max_length:
        raise RecipeError(
            f"a micro-batch of {tokens} tokens cannot hold a record of max_length "
            f"{data.max_length}",
            where=f"stage {stage.name}: batch.tokens",
            mend="raise it, or lower data.max_length",
        )


def _check_store(recipe: Recipe, processor: Any) -> Store:
    """The teacher's cache is complete, and of this teacher and processor."""
    assert recipe.teacher is not None
    assert recipe.teacher.cache is not None
    store = Store(Path(recipe.teacher.cache.folder))
    where = f"teacher.cache {store.folder}"
    again = "build it again with `mmkd cache`, or name another folder"
    if store.manifest["processor"] != processor_hash(processor):
        raise RecipeError(
            "it was built with another processor than the student's", where=where, mend=again
        )
    held, asked = store.manifest["teacher"].get("quantize"), recipe.teacher.quantize
    if recipe.teacher.model is not None and held != asked:
        raise RecipeError(
            f"it was built with quantize {held or 'null'}, and the recipe has {asked or 'null'}",
            where=where,
            mend=again,
        )
    weights = weights_hash(recipe.teacher.model)
    if weights is not None and weights != store.manifest["teacher"]["weights"]:
        raise RecipeError(
            f"it was built from other weights than {recipe.teacher.model}", where=where, mend=again
        )
    return store


def _check_stored(
    recipe: Recipe, stage: StageConfig, objectives: list[Objective], store: Store
) -> None:
    """The cache holds what the stage's objectives read."""
    reading = [o for o in objectives if "teacher" in o.needs]
    check_storable(stage, [o.config for o in reading], hidden=store.hidden is not None)
    length, data = store.manifest["max_length"], recipe.stage_data(stage)
    for objective in reading:
        regions, wanted = store.manifest["regions"], [getattr(objective.config, "region", None)]
        if objective.reads_hidden and store.hidden is not None:
            regions, wanted = store.hidden["regions"], [*objective.reads_hidden]
        if not {*wanted} <= {*regions} or data.max_length != length:
            raise RecipeError(
                f"the teacher's cache has regions {', '.join(regions)} at max_length {length}, not "
                f"{', '.join(map(str, wanted))} at {data.max_length}",
                where=f"stage {stage.name}: objective {objective.name}",
                mend="build it again with `mmkd cache`, or name another folder",
            )


def _check_teacher(
    stage: StageConfig,
    objectives: list[Objective],
    processor: Any,
    teacher_processor: Any,
) -> None:
    """Objectives that need a teacher have one. If teacher and student have different vocabularies
    or processors, objectives only compare what both have."""
    needing = [o for o in objectives if "teacher" in o.needs]
    if not needing:
        return
    if teacher_processor is None:
        names = [o.name for o in needing]
        raise RecipeError(
            f"objective {', '.join(names)} needs a teacher",
            where=f"stage {stage.name}",
            mend="add 'teacher' to the recipe",
        )
    try:
        shared_vocabulary(processor.tokenizer, teacher_processor.tokenizer)
    except CheckpointError as error:
        _check_vocabularies(stage, needing, error.what)
    if same_processor(processor, teacher_processor):
        return
    for objective in needing:
        region = getattr(objective.config, "region", "response")
        if "layers" in objective.needs or region not in ALIGNED:
            raise RecipeError(
                "teacher and student have different processors: only response and image tokens "
                "can be aligned, at the models' outputs",
                where=f"stage {stage.name}: objective {objective.name}",
                mend="use region response or vision, or models with one processor",
            )


def _check_vocabularies(stage: StageConfig, objectives: list[Objective], differ: str) -> None:
    """The objectives can compare models with different vocabularies."""
    for objective in objectives:
        region = getattr(objective.config, "region", "vision")
        if not objective.any_vocabulary or region != "vision":
            raise RecipeError(
                f"{differ}, and this objective compares them token by token",
                where=f"stage {stage.name}: objective {objective.name}",
                mend="use alm or uld for responses and relation for image tokens, or models of one "
                "tokenizer family",
            )


def _check_chunks(recipe: Recipe, stage: StageConfig, objectives: list[Objective]) -> None:
    """Objectives that compare chunks have one teacher, which is asked about all records."""
    if len(recipe.teachers) < 2 and not any(t.sources for t in recipe.teachers):
        return
    for objective in objectives:
        if "chunks" in objective.needs:
            raise RecipeError(
                "it compares with one teacher that is asked about all records",
                where=f"stage {stage.name}: objective {objective.name}",
                mend="name one teacher without 'sources', or use kl",
            )


def _check_packing(
    stage: StageConfig, objectives: list[Objective], processor: Any, teacher_processor: Any
) -> None:
    """Objectives of packed rows compare token by token, and the teacher gets the same rows."""
    if stage.batch.pack is None:
        return
    where, mend = f"stage {stage.name}: batch.pack", "set it to null"
    for objective in objectives:
        if "chunks" in objective.needs:
            raise RecipeError(
                f"objective {objective.name} looks for chunks in records that stand alone",
                where=where,
                mend=mend,
            )
        if objective.relates_tokens:
            raise RecipeError(
                f"objective {objective.name} relates the tokens of a row, and packed rows hold "
                "several records",
                where=where,
                mend=mend,
            )
    reading = teacher_processor is not None and any("teacher" in o.needs for o in objectives)
    if reading and not same_processor(processor, teacher_processor):
        what = "teacher and student have different processors"
        raise RecipeError(what, where=where, mend=mend)


def _check_contrast(stage: StageConfig, objectives: list[Objective]) -> None:
    """Objectives that compare the records of a micro-batch get at least two."""
    batch, processes = stage.batch, distributed.world_size()
    alone = batch.size == 1
    if batch.tokens is not None:
        alone = batch.records_per_step(processes) == processes
    for objective in objectives:
        if objective.relates_records and alone:
            raise RecipeError(
                "it compares the records of a micro-batch, and each micro-batch holds one",
                where=f"stage {stage.name}: objective {objective.name}",
                mend="set batch.size to 2 or more, or batch.total with batch.tokens",
            )


def _check_schedule(stage: StageConfig) -> None:
    """The warm-up ends before the decay begins."""
    course = stage.schedule
    if course.kind == "wsd" and course.warmup + course.decay > 1:
        raise RecipeError(
            f"warmup {course.warmup} and decay {course.decay} take more than all steps",
            where=f"stage {stage.name}: schedule",
            mend="lower one of them: both are shares of the steps",
        )


def _check_reference(stage: StageConfig, objectives: list[Objective]) -> None:
    preferences = [o for o in objectives if isinstance(o, Preference)]
    if len({(o.config.reference, o.config.reference_logps) for o in preferences}) > 1:
        raise RecipeError(
            "two preference objectives have different references",
            where=f"stage {stage.name}",
            mend="give them one, or two stages",
        )


def _check_on_policy(stage: StageConfig, objectives: list[Objective]) -> None:
    if stage.on_policy is None:
        return
    for objective in objectives:
        if isinstance(objective, CrossEntropy | Preference):
            raise RecipeError(
                "with 'on_policy' the responses are the student's own, not the data set's",
                where=f"stage {stage.name}: objective {objective.name}",
                mend="distil with kl, reverse_kl or jsd, or put it in a stage of its own",
            )


def _check_experts(
    stage: StageConfig, objectives: list[Objective], student: PreTrainedModel
) -> None:
    names = [o.name for o in objectives if "experts" in o.needs]
    if names and not moe_layers(student.config):
        raise RecipeError(
            f"objective {', '.join(names)} needs a student with experts",
            where=f"stage {stage.name}",
            mend="add {kind: moe} to student.convert",
        )


def _check_data(
    recipe: Recipe,
    stage: StageConfig,
    objectives: list[Objective],
    processor: Any,
    teacher_processor: Any,
    store: Store | None,
) -> None:
    """The first record of each source can be encoded by the processors of student and teacher, and
    is in the teacher's cache."""
    data = recipe.stage_data(stage)
    stored = store if any("teacher" in o.needs for o in objectives) else None
    encoder = Encoder.of(
        objectives, data, processor, teacher_processor=teacher_processor, store=stored
    )
    Mixture(encoder.records, recipe.seed)
    validation = build_validation(
        stage,
        objectives,
        data=data,
        processor=processor,
        teacher_processor=teacher_processor,
        teachers=recipe.teachers,
        stored=stored,
        filler=False,
        folder=Path(),
        seed=recipe.seed,
    )
    if validation is not None:
        check_held_out(validation, stored)
    for first in encoder.records.starts:
        batch = encoder.encode([first])
        for objective in objectives:
            objective.rows(batch.targets)
