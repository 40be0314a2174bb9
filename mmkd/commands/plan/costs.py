"""What a step costs in FLOPs and memory, from a model without weights and a sample of the data.

FLOPs count multiply and add as two (Kaplan et al. 2020, arXiv 2001.08361, section 2.1): a forward
costs 2 per parameter and token, gradients of weights and of activations 2 each, attention scores
and values 4 * length * width per layer and token, a Mamba-2 scan 4 P N for its state and chunk * (P
+ N) inside of a chunk, per head and token (arXiv 2405.21060, section 6). Of experts only those
count that a token meets. Activation memory follows Korthikanti et al. 2022 (arXiv 2205.05198, eq.
2, without stored attention scores): 34 bytes per token, unit of width and layer in 16 bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mmkd.engines import choose_precision
from mmkd.engines.deepspeed_config import resolve
from mmkd.engines.masters import needs_master
from mmkd.modeling.loading import parameter_count
from mmkd.ops.head_losses import BUFFERS
from mmkd.recipe import Precision, Quantization, StageConfig, TeacherPlacement
from mmkd.runtime import distributed
from mmkd_models.layout import mamba_layers
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.moe import SparseFfn
from mmkd_models.parts import find_parts

ACTIVATION_BYTES_16_BIT = 34
SCAN_CHUNK = 64
STATES = {"adamw": 2, "adam": 2, "sgd": 0, "adafactor": 1}


@dataclass(frozen=True)
class Sample:
    """Means per record: its tokens, those of one sequence (a pair has two), patches of the vision
    tower, for each objective that shares one product with the head its rows, and the rows of
    further products, after other layers."""

    length: float
    sequence: float
    supervised: float
    vision: float
    patches: float
    rows: dict[str, float]
    further_rows: float = 0.0

    @property
    def projected(self) -> float:
        """Rows that go through the head."""
        return max(self.rows.values(), default=0.0) + self.further_rows


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


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher that a stage asks: its model without weights, where and in how many bits its
    weights will be, how many of its decoder layers run if the stage reads layers only; None for
    all; and how often its logits are computed."""

    model: PreTrainedModel
    placement: TeacherPlacement = "replicated"
    quantize: Quantization | None = None
    layers: int | None = None
    head_passes: int = 1


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
    """Vision-tower tokens of a number of pixel values (three channels; Qwen-VL's towers read
    each image as two frames)."""
    vision = getattr(model.config, "vision_config", None)
    patch, frames = (getattr(vision, n, None) for n in ("patch_size", "temporal_patch_size"))
    return pixels / (3 * patch * patch * (frames or 1)) if patch else 0.0


def flops_per_record(
    student: PreTrainedModel,
    trainable: set[str],
    teachers: Sequence[PlannedTeacher],
    sample: Sample,
    *,
    two_passes: bool = False,
) -> dict[str, float]:
    """FLOPs of one record in one step, by what they are spent on.

    Args:
        student: its trainable weights are chosen.
        trainable: their names.
        teachers: all of them are asked about the record, the primary one first.
        sample: a mean record.
        two_passes: the student makes a first pass without gradients, because an objective compares
            the records of several micro-batches.
    """
    passes = _passes(student, trainable)
    if two_passes:
        passes |= {part: passes[part] + 1 for part in ("vision", "decoder")}
    forward = _forward(student, sample, sample.projected)
    found = {
        "student_vision": forward["vision"] * passes["vision"],
        "student_decoder": forward["decoder"] * passes["decoder"],
        "student_head": forward["head"] * passes["head"],
    }
    frozen = [_frozen(t, sample) for t in teachers]
    for parts in frozen[:1]:
        found |= {f"teacher_{part}": value for part, value in parts.items()}
    if frozen[1:]:
        found["teacher_others"] = sum(sum(parts.values()) for parts in frozen[1:])
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


def _frozen(teacher: PlannedTeacher, sample: Sample) -> dict[str, float]:
    parts = _forward(teacher.model, sample, teacher.head_passes * sample.projected)
    if teacher.layers is None:
        return parts
    share = teacher.layers / shape_of(teacher.model).depth
    return {**parts, "decoder": share * parts["decoder"], "head": 0.0}


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
    teachers: Sequence[PlannedTeacher],
    stage: StageConfig,
    sample: Sample,
    own: int = 0,
) -> dict[str, int]:
    """Bytes per process, an estimate: weights, gradients, optimizer, activations, head chunk; the
    student's trainable weights are chosen. `own` parameters of objectives count as the student's.

    Memory on the CPU of a GPU run is under `cpu`, and not in the total. ZeRO stage 1
    spreads master weights and optimizer states, 2 gradients too, 3 weights too (Rajbhandari et al.
    2020, arXiv 1910.02054, section 3).
    """
    shape = shape_of(student)
    tower = find_parts(student).vision
    seen = tower is not None and any(p.requires_grad for p in tower.parameters())
    weight = next(student.parameters()).element_size()
    device = distributed.choose_device(stage.engine.device)
    precision = choose_precision(stage.precision, device)
    scale = 1 if precision == "bfloat16" or weight == 2 else 2
    batch = stage.batch.micro_batch(sample.length)
    tokens = sample.length * batch
    patches = _patches(student, sample.patches) * batch
    per_unit = 2 if stage.activation_checkpointing else ACTIVATION_BYTES_16_BIT
    units = tokens * shape.width * shape.depth
    units += patches * shape.vision_width * shape.vision_depth * seen  # frozen ones keep none
    kept = units * per_unit
    if stage.activation_checkpointing:
        kept += _layer(shape, tokens, patches)  # the one that runs again
    rows = sample.projected * batch
    copied = sum(p.numel() for p in student.parameters() if needs_master(p))
    whole, trained = parameter_count(student) + own, trained + own
    found = _student_states(whole, trained, copied, weight, stage, precision)
    room = stage.engine.head_memory * 2**20
    found |= {
        "activations": round(kept * scale),
        "head_chunk": round(min(rows * shape.head[0] * 4 * BUFFERS, room)),
    }
    cpu = found.pop("cpu")
    weights = [_teacher_weights(t) for t in teachers]
    if weights:
        found["teacher_weights"] = weights[0][0]
        found["teacher_activations"] = max(  # they run one after another
            round(
                _layer(shape_of(t.model), tokens, _patches(t.model, sample.patches) * batch) * scale
            )
            for t in teachers
        )
    if weights[1:]:
        found["other_teachers_weights"] = sum(device for device, _ in weights[1:])
    cpu += sum(offloaded for _, offloaded in weights)
    taught_by_itself = any(t.model is student for t in teachers)  # its reference is that teacher
    if not taught_by_itself and any(
        getattr(o, "reference", None) == "self" for o in stage.objectives
    ):
        found["reference_weights"] = parameter_count(student) * weight
    return {**found, "total": sum(found.values()), "cpu": cpu}


def _teacher_weights(teacher: PlannedTeacher) -> tuple[int, int]:
    """Bytes of a teacher's weights on a process's device, and of those on the CPU. Weights that are
    spread are gathered layer by layer, and the head stays whole on every process."""
    model, whole = teacher.model, teacher_bytes(teacher.model, teacher.quantize)
    if teacher.placement == "replicated":
        return whole, 0
    share = whole // distributed.world_size()
    layer = max(parameter_bytes(layer) for layer in find_parts(model).decoder_layers)
    head = shape_of(model).head
    gathered = layer + head[0] * head[1] * next(model.parameters()).element_size()
    return (gathered, share) if teacher.placement == "offload" else (share + gathered, 0)


def _layer(shape: Shape, tokens: float, patches: float) -> float:
    """Bytes in 16 bit that one layer's forward takes while it runs."""
    widest = max(tokens * shape.width, patches * shape.vision_width)
    return ACTIVATION_BYTES_16_BIT * widest


def _student_states(
    parameters: int,
    trained: int,
    copied: int,
    weight: int,
    stage: StageConfig,
    precision: Precision,
) -> dict[str, int]:
    """Bytes of weights, gradients, and of optimizer states with master weights; `copied` of the
    trained weights have 16 bits, and the torch engine keeps float32 copies of them."""
    states = STATES[stage.optimizer.kind]
    if stage.engine.kind == "torch":
        return {
            "student_weights": parameters * weight,
            "gradients": trained * 4,
            "optimizer": trained * 4 * states + copied * 4,
            "cpu": 0,
        }
    settings = resolve(stage)["zero_optimization"]
    zero, processes = settings["stage"], distributed.world_size()
    weight = 2 if precision == "bfloat16" else weight
    found = {
        "student_weights": parameters * weight // (processes if zero == 3 else 1),
        "gradients": trained * weight // (processes if zero >= 2 else 1),
        "optimizer": trained * 4 * (states + 1) // processes if zero else trained * 4 * states,
    }
    cpu = 0
    for name, part in (("offload_optimizer", "optimizer"), ("offload_param", "student_weights")):
        if settings.get(name, {}).get("device", "none") != "none":
            cpu += found.pop(part)
            found[part] = 0
    return {**found, "cpu": cpu}


def teacher_bytes(teacher: PreTrainedModel, quantize: Quantization | None) -> int:
    """Bytes of a teacher's weights. Quantized, its language model's linear layers have 4 or 8 bits
    a weight; NF4 also has a float32 scale for each 64 of them (Dettmers et al. 2023,
    arXiv 2305.14314, section 3)."""
    whole = parameter_bytes(teacher)
    if quantize is None:
        return whole
    parts = find_parts(teacher)
    layers = [m for m in parts.decoder.modules() if type(m) is nn.Linear and m is not parts.head]
    count = sum(m.weight.numel() for m in layers)
    packed = count // 2 + count // 16 if quantize == "4bit" else count
    return whole - sum(m.weight.numel() * m.weight.element_size() for m in layers) + packed


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
