"""What a run would cost, computed from configs and a sample of the data, without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.commands.plan.costs import (
    PlannedTeacher,
    Sample,
    flops_per_record,
    idle_parameters,
    memory,
    parameter_bytes,
)
from mmkd.commands.plan.made import plan_made
from mmkd.commands.plan.teacher_size import decoder_parameters, size_advice
from mmkd.data.encoder import Encoder
from mmkd.data.image_tokens import ImageTokenDropout
from mmkd.data.mixture import Mixture
from mmkd.data.records import Records
from mmkd.data.sources import is_there
from mmkd.modeling.capture_request import LayerPlan
from mmkd.modeling.layer_projections import attention_layers
from mmkd.modeling.loading import parameter_count, skeleton
from mmkd.objectives import HeadObjective, Objective, Preference, build_objective
from mmkd.recipe import DataConfig, Recipe, StageConfig
from mmkd.runs import preflight, timings
from mmkd.runs.make_data import stage_recipe
from mmkd.runs.members import Member, members
from mmkd.runtime import distributed
from mmkd.students import converted_processor, finished, set_trainable, student_at
from mmkd.teachers import (
    choose_placement,
    earlier_stage,
    limit_to_sources,
    needed_teachers,
    reads_layers_only,
    with_stage_teachers,
)
from mmkd.training.objective_modules import build_own
from mmkd_models.layout import mamba_layers

SAMPLED_RECORDS = 48
MANY_EPOCHS = 100
"""Number of passes over the data from which on a plan warns."""


def check_recipe(recipe: Recipe, *, without_data: bool = False) -> None:
    """Raise the errors that `mmkd run` would raise before its first step.

    Args:
        recipe: with its variants.
        without_data: do not check the data and the evaluation's tasks, which may not exist yet.

    Raises:
        MmkdError: see `mmkd.runs.preflight`.
    """
    seen: list[dict[str, Any]] = []
    for member in members(recipe):
        if (content := _content(member.recipe)) not in seen:
            untrained = member.untrained_teacher
            preflight.check(member.recipe, data=not without_data, assistant=untrained)
            seen.append(content)
    if recipe.evaluate is not None and not without_data:
        preflight.check_evaluation(recipe.evaluate, recipe.student)


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """The plan of every member and stage, as JSON values.

    Members that differ in their seed only are planned once. If the data do not exist yet, sequences
    of `max_length` tokens are assumed.
    """
    planned: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    found: dict[str, dict[str, Any]] = {}
    trained = members(recipe)
    for number, member in enumerate(trained):
        content = _content(member.recipe)
        stages = next((made for known, made in planned if known == content), None)
        if stages is None:
            processor = converted_processor(member.recipe.student)
            teachers = _teachers(member.recipe, member.untrained_teacher)
            stages = [
                plan_stage(member.recipe, stage, processor, teachers, data=_data(member, index))
                for index, stage in enumerate(member.recipe.stages)
            ]
            planned.append((content, stages))
        found[member.label] = {
            "differs": recipe.variants.get(member.recipe.label, []),
            "seed": member.recipe.seed,
            "shared_stages": _shared(member, trained[:number]),
            "stages": stages,
            "total": _sum(stages),
        }
    primary = next(iter(_teachers(recipe).values()), None)
    alone = [stage for m in found.values() for stage in m["stages"][m["shared_stages"] :]]
    return {
        "name": recipe.name,
        "processes": distributed.world_size(),
        "teacher": None if primary is None else {"parameters": parameter_count(primary)},
        "members": found,
        "made": plan_made(trained),
        "total": _sum(alone),
        "warnings": _warnings(found),
        "notes": _notes(found),
        "recipe": recipe.model_dump(mode="json"),
    }


def _teachers(recipe: Recipe, assistant: Recipe | None = None) -> dict[str, PreTrainedModel]:
    """The teachers that run, by name and without weights; arguments as in `preflight.check`."""
    if assistant is not None and recipe.teacher is not None:
        return {recipe.teacher.name: finished(assistant)}
    return {t.name: skeleton(t) for t in recipe.teachers if t.source == "live"}


def _data(member: Member, index: int) -> DataConfig:
    """The data that a stage reads, in its folder if they are made right before it."""
    own = stage_recipe(member, index)
    return own.stage_data(own.stages[index])


def _content(recipe: Recipe) -> dict[str, Any]:
    """The settings that a plan depends on."""
    return recipe.model_dump(mode="json", exclude={"label", "name", "seed", "output_dir"})


def _shared(member: Member, before: list[Member]) -> int:
    """Number of stages that a run takes over from an earlier member."""
    return max((timings.common_stages(member.recipe, o.recipe) for o in before), default=0)


def _sum(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of steps, tokens, FLOPs and seconds; seconds are None if a stage was not timed."""
    seconds = [stage["seconds"] for stage in stages]
    return {
        **{key: sum(stage[key] for stage in stages) for key in ("steps", "tokens", "flops")},
        "seconds": None if None in seconds else sum(seconds),
    }


def _warnings(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each stage whose length is very large or unknown."""
    lines = {
        f"stage {stage['stage']} passes over its {stage['records']:,} records "
        f"{stage['epochs']:,.0f} times ({stage['steps']:,} steps)": None
        for member in found.values()
        for stage in member["stages"]
        if stage["records"] and stage["epochs"] >= MANY_EPOCHS
    }
    lines |= {
        f"stage {stage['stage']} is given in epochs, and its data do not exist yet: its steps are "
        "not known, and the totals count one": None
        for member in found.values()
        for stage in member["stages"]
        if not stage["records"] and stage["settings"]["steps"] is None
    }
    return list(lines)


def plan_stage(
    recipe: Recipe,
    stage: StageConfig,
    processor: Any,
    teachers: Mapping[str, PreTrainedModel],
    sampled: tuple[Sample, int] | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """One stage's plan.

    Args:
        recipe: of one student.
        stage: of this recipe.
        processor: the student's.
        teachers: those of the recipe that run, by name and without weights.
        sampled: a mean record and the number of records of an epoch; None reads them from the data.
        data: that the stage reads; those of the recipe by default.
    """
    index, earlier = recipe.stages.index(stage), earlier_stage(recipe, stage)
    second = timings.seconds_per_step(recipe, index)
    recipe = with_stage_teachers(recipe, stage)
    if earlier is not None:
        assert recipe.teacher is not None
        teachers = {recipe.teacher.name: student_at(recipe, earlier, meta=True)}
    student = student_at(recipe, index, meta=True)
    trainable = set(set_trainable(student, stage.train.groups, stage.train.lora))
    objectives = _objectives_of(recipe, stage, student, teachers)
    if sampled is None:
        sampled = sample_data(data or recipe.stage_data(stage), processor, objectives, stage)
    sample, records = sampled
    processes = distributed.world_size()
    device = distributed.choose_device(stage.engine.device)
    per_step = stage.batch.records_per_step(processes)
    steps = timings.steps_over(stage, records)
    teacher = _primary(recipe, student, teachers)
    with torch.device("meta"):
        own = parameter_count(build_own(objectives, student, teacher))
    trained = sum(p.numel() for n, p in student.named_parameters() if n in trainable)
    asked = _planned_teachers(recipe, stage, teachers, student, device)
    if asked and asked[0].placement == "replicated":
        asked[0] = replace(asked[0], layers=_layers_that_run(objectives))
    if stage.ensemble is not None and stage.ensemble.kappa is not None:
        asked = [replace(teacher, head_passes=2) for teacher in asked]
    gathers = any(o.gathers for o in objectives) and stage.batch.micro_steps(processes) != 1
    spent = flops_per_record(student, trainable, asked, sample, two_passes=gathers)
    flops = {k: round(v * per_step) for k, v in spent.items()}
    return {
        "stage": stage.name,
        "settings": stage.model_dump(mode="json"),
        "parameters": parameter_count(student),
        "active_parameters": parameter_count(student) - idle_parameters(student),
        "trainable": trained,
        "trainable_share": round(trained / parameter_count(student), 4),
        "records": records,
        "records_per_step": per_step,
        "steps": steps,
        "epochs": round(steps * per_step / max(records, 1), 3),
        "tokens_per_step": round(sample.length * per_step),
        "supervised_tokens_per_step": round(sample.supervised * per_step),
        "vision_tokens_per_step": round(sample.vision * per_step),
        "flops_per_step": flops,
        "tokens": round(sample.length * per_step) * steps,
        "flops": flops["total"] * steps,
        "seconds": None if second is None else second * steps,
        "memory_bytes": memory(student, trained, asked, stage, sample, own),
        "device_memory_bytes": distributed.memory_of(device),
        "teacher_placement": _placement(recipe, stage, asked),
        "teacher_sizes": _sizes(recipe, stage, teachers, student),
    }


def _objectives_of(
    recipe: Recipe,
    stage: StageConfig,
    student: PreTrainedModel,
    teachers: Mapping[str, PreTrainedModel],
) -> list[Objective]:
    teacher = _primary(recipe, student, teachers)
    made = [
        build_objective(
            o,
            mamba_layers=mamba_layers(student.config),
            attention_layers=attention_layers(student),
            teacher_attention_layers=[] if teacher is None else attention_layers(teacher),
        )
        for o in stage.objectives
    ]
    return [limit_to_sources(o, recipe.stage_data(stage)) for o in made]


def _primary(
    recipe: Recipe, student: PreTrainedModel, teachers: Mapping[str, PreTrainedModel]
) -> PreTrainedModel | None:
    """The primary teacher's model; None if there is none, or a cache."""
    primary = recipe.teacher
    if primary is None:
        return None
    return student if primary.source == "self" else teachers.get(primary.name)


def _layers_that_run(objectives: Sequence[Objective]) -> int | None:
    """Number of the primary teacher's decoder layers that run; None for all of them."""
    asking = [o for o in objectives if "teacher" in o.needs or isinstance(o, Preference)]
    layers = LayerPlan.of(objectives).teacher_request().layers
    return max(layers) + 1 if layers and all(map(reads_layers_only, asking)) else None


def _planned_teachers(
    recipe: Recipe,
    stage: StageConfig,
    teachers: Mapping[str, PreTrainedModel],
    student: PreTrainedModel,
    device: torch.device,
) -> list[PlannedTeacher]:
    """The teachers that run in a stage, the primary one first, as the run will place them."""
    planned = []
    for config in needed_teachers(recipe.teachers, stage.objectives):
        if config.source == "self":
            planned.append(PlannedTeacher(student))
        elif config.source == "live":
            model, placement = teachers[config.name], config.placement
            if config.quantize is not None:
                planned.append(PlannedTeacher(model, quantize=config.quantize))
            else:
                size = parameter_bytes(model)
                planned.append(PlannedTeacher(model, choose_placement(placement, size, device)))
    return planned


def _sizes(
    recipe: Recipe,
    stage: StageConfig,
    teachers: Mapping[str, PreTrainedModel],
    student: PreTrainedModel,
) -> dict[str, list[int]]:
    """Parameters of the decoders of each teacher that runs in a stage, and of the student."""
    needed = [t.name for t in needed_teachers(recipe.teachers, stage.objectives)]
    mine = decoder_parameters(student)
    return {n: [decoder_parameters(teachers[n]), mine] for n in needed if n in teachers}


def _notes(found: dict[str, dict[str, Any]]) -> list[str]:
    """Advice on the sizes of teachers, each once."""
    said = (
        size_advice(sizes[0], sizes[1], name)
        for member in found.values()
        for stage in member["stages"]
        for name, sizes in stage["teacher_sizes"].items()
    )
    return list(dict.fromkeys(text for text in said if text is not None))


def _placement(recipe: Recipe, stage: StageConfig, planned: Sequence[PlannedTeacher]) -> str | None:
    """Where the primary teacher's weights are, in words; None where no teacher is needed."""
    needed = needed_teachers(recipe.teachers, stage.objectives)
    said = {"cache": "read from its cache", "self": "the student itself"}
    return (said.get(needed[0].source) or planned[0].placement) if needed else None


def sample_data(
    data: DataConfig,
    processor: Any,
    objectives: list[Objective],
    stage: StageConfig,
) -> tuple[Sample, int]:
    """Mean token counts of some records, and the number of records of an epoch. If the data do not
    exist yet: sequences of `max_length` tokens, and 0 records.

    Args:
        data: of a stage.
        processor: of the student.
        objectives: of the stage.
        stage: its settings.
    """
    apart = stage.balance_gradients
    if not all(map(is_there, data.parts)):
        length = float(data.max_length)
        rows = dict.fromkeys((o.name for o in objectives), length)
        return Sample(length, length, length, 0.0, 0.0, *_projected(objectives, rows, apart)), 0
    records = Records(data)
    settings = [o.config for o in objectives]
    encoder = Encoder.of(
        settings,
        data,
        processor,
        records=records,
        sources=any(o.sources is not None for o in objectives),
        sampled=stage.samples_all,
    )
    mixture = Mixture(records, seed=0)
    chosen = mixture.sample(SAMPLED_RECORDS)
    count, batch = len(chosen), encoder.encode(chosen)
    vision = float(batch.targets.vision.sum())  # the connector runs on all
    if stage.image_tokens is not None:
        keep, image_token = stage.image_tokens.keep, encoder.processing.image_token_id
        batch = ImageTokenDropout(keep, 0, image_token)(batch, 0)
    targets = batch.targets
    pixels = sum(v.numel() for k, v in batch.inputs.items() if k.startswith("pixel_values"))
    rows = {
        o.name: float(o.rows(targets.of(o.sources)).sum()) / count
        for o in objectives
        if "distribution" in o.needs
    }
    shared, further = _projected(objectives, rows, apart)
    return (
        Sample(
            length=float(targets.attention.sum()) / count,
            sequence=float(targets.attention.sum()) / len(targets.attention),
            supervised=float(targets.response.sum()) / count,
            vision=vision / count,
            patches=pixels / count,
            rows=shared,
            further_rows=further,
        ),
        len(mixture),
    )


def _projected(
    objectives: Sequence[Objective], rows: Mapping[str, float], apart: bool
) -> tuple[dict[str, float], float]:
    """Rows of the objectives that share one product with the head, by name, and the rows of further
    products.

    Args:
        objectives: of a stage. Each of their exits has a product of its own.
        rows: of objectives, by name.
        apart: objectives on the head's output do not share a product (`balance_gradients`).
    """
    exits = {o.name: len(o.exits) for o in objectives if o.exits}
    shared = {name: count for name, count in rows.items() if name not in exits}
    further = sum(rows[name] * number for name, number in exits.items())
    heads = [rows[o.name] for o in objectives if isinstance(o, HeadObjective)]
    if apart and heads:
        further += sum(heads) - max(heads)
    return shared, further
