"""`mmkd plan`: what a run would cost, from configs and a sample of the data, without weights."""

from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from mmkd import distributed
from mmkd.costs import Sample, flops_per_record, idle_parameters, memory, parameter_bytes
from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture
from mmkd.data.records import Records
from mmkd.data.sources import is_there
from mmkd.errors import MmkdError
from mmkd.loading import load_processor, parameter_count, skeleton
from mmkd.objectives import Objective, build_objective
from mmkd.pipeline import members
from mmkd.progress import console
from mmkd.recipe import DataConfig, Recipe, StageConfig, TeacherPlacement, TrainConfig
from mmkd.students import convert, set_trainable
from mmkd.teachers import choose_placement
from mmkd_models.layout import mamba_layers

SAMPLED_RECORDS = 48


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """The plan of every member and stage as plain JSON values."""
    processor = load_processor(recipe.student)
    teacher = None
    if recipe.teacher is not None and recipe.teacher.source == "live":
        teacher = skeleton(recipe.teacher)
    return {
        "name": recipe.name,
        "processes": distributed.world_size(),
        "teacher": None if teacher is None else {"parameters": parameter_count(teacher)},
        "members": {
            member.label: {
                "stages": [
                    plan_stage(member.recipe, stage, processor, teacher)
                    for stage in member.recipe.stages
                ]
            }
            for member in members(recipe)
        },
        "recipe": recipe.model_dump(mode="json"),
    }


def plan_stage(
    recipe: Recipe,
    stage: StageConfig,
    processor: Any,
    teacher: PreTrainedModel | None,
    sampled: tuple[Sample, int] | None = None,
) -> dict[str, Any]:
    """One stage's plan; `sampled` are a mean record and the records of an epoch, read from the
    data if left out."""
    student = skeleton(recipe.student)
    until = recipe.stages.index(stage) + 1
    for conversions in (recipe.student.convert, *(s.convert for s in recipe.stages[:until])):
        convert(student, conversions)
    trainable = set(set_trainable(student, stage.train.groups, stage.train.lora))
    mamba = mamba_layers(student.config)
    objectives = [build_objective(o, mamba_layers=mamba) for o in stage.objectives]
    if recipe.teacher is not None and recipe.teacher.source == "self":
        teacher = student
    teacher = teacher if any("teacher" in o.needs for o in objectives) else None
    others = [skeleton(t) for t in recipe.more_teachers] if teacher is not None else []
    if sampled is None:
        sampled = sample_data(recipe.stage_data(stage), processor, objectives)
    sample, records = sampled
    processes = distributed.world_size()
    device = distributed.choose_device(stage.engine.device)
    per_step = stage.batch.records_per_step(processes)
    steps = stage.steps or max(1, round((stage.epochs or 1) * records / per_step))
    trained = sum(p.numel() for n, p in student.named_parameters() if n in trainable)
    placement: TeacherPlacement = "replicated"
    if teacher is not None and recipe.teacher is not None:
        wanted = recipe.teacher.placement
        placement = choose_placement(wanted, parameter_bytes(teacher), device)
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
        "flops_per_step": {
            k: round(v * per_step)
            for k, v in flops_per_record(student, trainable, teacher, sample, others).items()
        },
        "memory_bytes": _with_others(
            memory(student, trained, teacher, stage, sample, placement), others
        ),
        "device_memory_bytes": distributed.memory_of(device),
        "teacher_placement": _placement(recipe, objectives, placement),
    }


def _with_others(memory: dict[str, int], others: list[PreTrainedModel]) -> dict[str, int]:
    """Memory with the weights of further teachers, whole."""
    if not others:
        return memory
    weights = sum(map(parameter_bytes, others))
    return {**memory, "other_teachers_weights": weights, "total": memory["total"] + weights}


def _placement(
    recipe: Recipe, objectives: list[Objective], placement: TeacherPlacement
) -> str | None:
    if recipe.teacher is None or not any("teacher" in o.needs for o in objectives):
        return None
    said = {"cache": "read from its cache", "self": "the student itself"}
    return said.get(recipe.teacher.source, placement)


def sample_data(
    data: DataConfig, processor: Any, objectives: list[Objective]
) -> tuple[Sample, int]:
    """Token counts of some of an epoch's records, and how many it has; where there is no data yet,
    full-length sequences."""
    if not all(map(is_there, data.parts)):
        length = float(data.max_length)
        rows = {o.name: length for o in objectives}
        return Sample(length, length, length, 0.0, 0.0, rows), 0
    records = Records(data)
    encoder = Encoder.of(objectives, data, processor, records=records)
    mixture = Mixture(records, seed=0)
    chosen = mixture.sample(SAMPLED_RECORDS)
    count, batch = len(chosen), encoder.encode(chosen)
    targets = batch.targets
    pixels = sum(v.numel() for k, v in batch.inputs.items() if k.startswith("pixel_values"))
    return (
        Sample(
            length=float(targets.attention.sum()) / count,
            sequence=float(targets.attention.sum()) / len(targets.attention),
            supervised=float(targets.response.sum()) / count,
            vision=float(targets.vision.sum()) / count,
            patches=pixels / count,
            rows={
                o.name: float(o.rows(targets).sum()) / count
                for o in objectives
                if "distribution" in o.needs
            },
        ),
        len(mixture),
    )


def human(value: float, unit: str = "") -> str:
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {letter}{unit}"
    return f"{value:.0f} {unit}".strip()


def print_plan(plan: dict[str, Any]) -> None:
    """The plan as a table, one column a stage, and the settings behind it."""
    if plan["teacher"]:
        console.print(f"teacher: {human(plan['teacher']['parameters'])} parameters")
    for label, member in plan["members"].items():
        if not member["stages"]:
            raise MmkdError("the recipe has no stages")
        table = Table(title=f"{plan['name']}: {label}")
        table.add_column("")
        for stage in member["stages"]:
            table.add_column(stage["stage"], justify="right")
        for name, read in _ROWS.items():
            table.add_row(name, *(str(read(stage)) for stage in member["stages"]))
        console.print(table)


_ROWS: dict[str, Any] = {
    "objectives": lambda s: " + ".join(_objective(o) for o in s["settings"]["objectives"]),
    "trains": lambda s: TrainConfig(**s["settings"]["train"]).words,
    "parameters": lambda s: human(s["parameters"]),
    "  a token meets": lambda s: human(s["active_parameters"]),
    "trainable": lambda s: f"{human(s['trainable'])} ({100 * s['trainable_share']:.0f} %)",
    "optimizer": lambda s: "{kind} lr {lr:g}".format(**s["settings"]["optimizer"]),
    "schedule": lambda s: s["settings"]["schedule"]["kind"],
    "engine": lambda s: f"{_engine(s['settings']['engine'])}, {s['settings']['precision']}",
    "teacher's weights": lambda s: s["teacher_placement"] or "",
    "records": lambda s: f"{s['records']:,}" if s["records"] else "not built yet",
    "records per step": lambda s: s["records_per_step"],
    "steps (epochs)": lambda s: f"{s['steps']:,} ({s['epochs']:g})",
    "tokens per step": lambda s: human(s["tokens_per_step"]),
    "  supervised": lambda s: human(s["supervised_tokens_per_step"]),
    "  of images": lambda s: human(s["vision_tokens_per_step"]),
    "FLOPs per step": lambda s: human(s["flops_per_step"]["total"], "FLOP"),
    "  of the teacher": lambda s: human(
        sum(v for k, v in s["flops_per_step"].items() if k.startswith("teacher")), "FLOP"
    ),
    "memory, estimated": lambda s: human(s["memory_bytes"]["total"], "B"),
    "  there is": lambda s: _fits(s["memory_bytes"]["total"], s["device_memory_bytes"]),
    "  activations": lambda s: human(s["memory_bytes"]["activations"], "B"),
    "  beside it, on the CPU": lambda s: human(s["memory_bytes"]["cpu"], "B"),
}


def _fits(needed: int, there: int) -> str:
    return human(there, "B") + (", too little" if needed > there else "")


def _engine(settings: dict[str, Any]) -> str:
    if settings["kind"] == "torch":
        return "torch"
    stage = settings["zero"]
    return "deepspeed" if stage is None else f"deepspeed, ZeRO {stage}"


def _objective(settings: dict[str, Any]) -> str:
    region = settings.get("region", "response")
    name = settings["kind"] if region == "response" else f"{settings['kind']}@{region}"
    return name if settings["weight"] == 1 else f"{settings['weight']:g} {name}"
