"""`mmkd plan`: what a run would cost, from configs and a sample of the data, without weights.

FLOPs count multiply and add as two (Kaplan et al. 2020, arXiv 2001.08361, section 2.1): a forward
costs 2 per parameter and token, gradients of weights and of activations 2 each, attention scores
and values 4 * length * width per layer and token, a Mamba-2 scan 4 P N for its state and chunk * (P
+ N) inside of a chunk, per head and token (arXiv 2405.21060, section 6). Of experts only those
count that a token meets. Activation memory follows Korthikanti et al. 2022 (arXiv 2205.05198, eq.
2, without stored attention scores): 34 bytes per token, unit of width and layer in 16 bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from mmkd import distributed
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.engines import choose_precision
from mmkd.errors import MmkdError
from mmkd.loading import load_processor, parameter_count, skeleton
from mmkd.objectives import Objective, build_objective
from mmkd.ops.linear_loss import CHUNK_ELEMENTS
from mmkd.pipeline import members
from mmkd.progress import console
from mmkd.recipe import DataConfig, Recipe, StageConfig
from mmkd.students import convert, set_trainable
from mmkd_models.layout import mamba_layers
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.moe import SparseFfn
from mmkd_models.parts import find_parts

SAMPLED_RECORDS = 48
ACTIVATION_BYTES_16_BIT = 34
SCAN_CHUNK = 64
STATES = {"adamw": 2, "adam": 2, "sgd": 0, "adafactor": 1}


@dataclass(frozen=True)
class Sample:
    """Means per record: its tokens, those of one sequence (a pair has two), patches of the vision
    tower, and for each objective on the head's output its rows."""

    length: float
    sequence: float
    supervised: float
    vision: float
    patches: float
    rows: dict[str, float]

    @property
    def projected(self) -> float:
        """Rows that go through the head."""
        return max(self.rows.values(), default=0.0)


@dataclass(frozen=True)
class Shape:
    """What a model's cost depends on: parameters of its parts, of the decoder those that one token
    meets, widths and depths."""

    decoder: int
    vision: int
    connector: int
    head: tuple[int, int]
    width: int
    depth: int
    vision_width: int
    vision_depth: int


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """The plan of every member and stage as plain JSON values."""
    processor = load_processor(recipe.student)
    teacher = None
    if recipe.teacher is not None:
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
    recipe: Recipe, stage: StageConfig, processor: Any, teacher: PreTrainedModel | None
) -> dict[str, Any]:
    student = skeleton(recipe.student)
    until = recipe.stages.index(stage) + 1
    for conversions in (recipe.student.convert, *(s.convert for s in recipe.stages[:until])):
        convert(student, conversions)
    trainable = set(set_trainable(student, stage.train))
    mamba = mamba_layers(student.config)
    objectives = [build_objective(o, mamba_layers=mamba) for o in stage.objectives]
    teacher = teacher if any("teacher" in o.needs for o in objectives) else None
    data = recipe.stage_data(stage)
    sample, records = sample_data(data, processor, objectives)
    processes = distributed.world_size()
    per_step = stage.batch.size * stage.batch.micro_steps(processes) * processes
    steps = stage.steps or max(1, round((stage.epochs or 1) * records / per_step))
    trained = sum(p.numel() for n, p in student.named_parameters() if n in trainable)
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
            for k, v in flops_per_record(student, trainable, teacher, sample).items()
        },
        "memory_bytes": memory(student, trained, teacher, stage, sample),
    }


def sample_data(
    data: DataConfig, processor: Any, objectives: list[Objective]
) -> tuple[Sample, int]:
    """Token counts of some records; where there is no data yet, full-length sequences."""
    if not Path(data.train).is_file():
        length = float(data.max_length)
        rows = {o.name: length for o in objectives}
        return Sample(length, length, length, 0.0, 0.0, rows), 0
    records = Records(data)
    encoder = Encoder.of(objectives, data, processor, records=records)
    count = min(SAMPLED_RECORDS, len(records))
    spread = [i * len(records) // count for i in range(count)]
    batch = encoder.encode(spread)
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
        len(records),
    )


def shape_of(model: PreTrainedModel) -> Shape:
    parts = find_parts(model)
    text = model.config.get_text_config()
    vision = getattr(model.config, "vision_config", None)
    embeddings = parameter_count(model.get_input_embeddings())
    decoder = parameter_count(parts.decoder) - embeddings
    tower = parameter_count(parts.vision) if parts.vision is not None else 0
    head = parts.head.weight
    assert isinstance(head, torch.Tensor)
    tied = head is model.get_input_embeddings().weight
    connector = (
        parameter_count(model) - decoder - embeddings - tower - (0 if tied else head.numel())
    )
    return Shape(
        decoder=decoder - idle_parameters(model),
        vision=tower,
        connector=connector,
        head=(head.shape[0], head.shape[1]),
        width=text.hidden_size,
        depth=len(parts.decoder_layers),
        vision_width=getattr(vision, "hidden_size", 0) or 0,
        vision_depth=len(parts.vision_layers or ()),
    )


def idle_parameters(model: PreTrainedModel) -> int:
    """Parameters of experts that a token does not meet."""
    sparse = [m for m in find_parts(model).decoder.modules() if isinstance(m, SparseFfn)]
    return sum(
        parameter_count(m.experts) * (m.layout.experts - m.layout.top_k) // m.layout.experts
        for m in sparse
    )


def _patches(model: PreTrainedModel, pixels: float) -> float:
    """Vision-tower tokens behind a number of pixel values (three channels)."""
    patch = getattr(getattr(model.config, "vision_config", None), "patch_size", None)
    return pixels / (3 * patch * patch) if patch else 0.0


def flops_per_record(
    student: PreTrainedModel,
    trainable: set[str],
    teacher: PreTrainedModel | None,
    sample: Sample,
) -> dict[str, float]:
    """FLOPs of one record in one step, by what they are spent on."""
    passes = _passes(student, trainable)
    forward = _forward(student, sample, sample.projected)
    found = {
        "student_vision": forward["vision"] * passes["vision"],
        "student_decoder": forward["decoder"] * passes["decoder"],
        "student_head": forward["head"] * passes["head"],
    }
    if teacher is not None:
        frozen = _forward(teacher, sample, sample.projected)
        found |= {f"teacher_{part}": value for part, value in frozen.items()}
    return {**found, "total": sum(found.values())}


def _passes(student: PreTrainedModel, trainable: set[str]) -> dict[str, int]:
    """How many times the forward's FLOPs each part costs: 1, +1 for gradients of activations
    that something before it needs, +1 for gradients of its own weights."""
    parts = find_parts(student)
    ids = {id(p) for n, p in student.named_parameters() if n in trainable}

    def trains(module: nn.Module | None) -> bool:
        return module is not None and any(id(p) in ids for p in module.parameters())

    vision, decoder = trains(parts.vision), trains(parts.decoder)
    known = [parts.vision, parts.decoder, parts.head]
    inside = {id(p) for m in known if m is not None for p in m.parameters()}
    before = vision or bool(ids - inside)
    return {
        "vision": 1 + 2 * vision,
        "decoder": 1 + (before or decoder) + decoder,
        "head": 1 + (before or decoder) + trains(parts.head),
    }


def _forward(model: PreTrainedModel, sample: Sample, rows: float) -> dict[str, float]:
    shape = shape_of(model)
    patches = _patches(model, sample.patches)
    layers = shape.depth - len(mamba_layers(model.config))
    attention = 4 * sample.sequence * shape.width * layers / 2  # causal: half the square
    vision_attention = 4 * patches * shape.vision_width * shape.vision_depth
    return {
        "vision": patches * (2 * shape.vision + vision_attention)
        + 2 * sample.vision * shape.connector,
        "decoder": sample.length * (2 * shape.decoder + attention + _scan(model)),
        "head": rows * 2 * shape.head[0] * shape.head[1],
    }


def _scan(model: PreTrainedModel) -> float:
    """FLOPs of all scans per token."""
    mixers = [m for m in find_parts(model).decoder.modules() if isinstance(m, Mamba2Mixer)]
    return sum(
        m.shape.heads
        * (4 * m.shape.value_dim * m.d_state + SCAN_CHUNK * (m.shape.value_dim + m.d_state))
        for m in mixers
    )


def memory(
    student: PreTrainedModel,
    trained: int,
    teacher: PreTrainedModel | None,
    stage: StageConfig,
    sample: Sample,
) -> dict[str, int]:
    """Bytes per process, an estimate: weights, gradients, optimizer, activations, head chunk."""
    shape = shape_of(student)
    weight = next(student.parameters()).element_size()
    device = distributed.choose_device(stage.engine.device)
    precision = choose_precision(stage.precision, device)
    scale = 1 if precision == "bfloat16" or weight == 2 else 2
    tokens = sample.length * stage.batch.size
    patches = _patches(student, sample.patches) * stage.batch.size
    per_unit = 2 if stage.activation_checkpointing else ACTIVATION_BYTES_16_BIT
    units = tokens * shape.width * shape.depth + patches * shape.vision_width * shape.vision_depth
    rows = sample.projected * stage.batch.size
    found = {
        "student_weights": parameter_count(student) * weight,
        "gradients": trained * weight,
        "optimizer": trained * weight * STATES[stage.optimizer.kind],
        "activations": round(units * per_unit * scale),
        "head_chunk": round(3 * 4 * min(rows * shape.head[0], CHUNK_ELEMENTS)),
    }
    if teacher is not None:
        found["teacher_weights"] = (
            parameter_count(teacher) * next(teacher.parameters()).element_size()
        )
    if any(getattr(o, "reference", None) == "self" for o in stage.objectives):
        found["reference_weights"] = found["student_weights"]
    return {**found, "total": sum(found.values())}


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
    "trains": lambda s: ", ".join(s["settings"]["train"]),
    "parameters": lambda s: human(s["parameters"]),
    "  a token meets": lambda s: human(s["active_parameters"]),
    "trainable": lambda s: f"{human(s['trainable'])} ({100 * s['trainable_share']:.0f} %)",
    "optimizer": lambda s: "{kind} lr {lr:g}".format(**s["settings"]["optimizer"]),
    "schedule": lambda s: s["settings"]["schedule"]["kind"],
    "engine": lambda s: f"{s['settings']['engine']['kind']}, {s['settings']['precision']}",
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
    "  activations": lambda s: human(s["memory_bytes"]["activations"], "B"),
}


def _objective(settings: dict[str, Any]) -> str:
    region = settings.get("region", "response")
    name = settings["kind"] if region == "response" else f"{settings['kind']}@{region}"
    return name if settings["weight"] == 1 else f"{settings['weight']:g} {name}"
