"""Distil models and records that a program has, by the trainer that runs use."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict, Unpack

import torch
from transformers import PreTrainedModel

from mmkd.api.loaded import Loaded, ModelLike, dtype_name, load, shared_weights
from mmkd.api.pieces import ObjectiveLike, keys_of
from mmkd.api.records import data_of
from mmkd.data.generation import set_ends
from mmkd.data.templates import check_processor
from mmkd.errors import MmkdError, RecipeError
from mmkd.modeling.adapters import merge_adapters
from mmkd.modeling.layer_projections import attention_layers
from mmkd.objectives import build_objective
from mmkd.recipe import Recipe, StageConfig, load_recipe
from mmkd.recipe.context import StageContext
from mmkd.runs.preflight import check_stage
from mmkd.runtime import distributed
from mmkd.teachers import LoadedTeachers, Teacher, place_teacher
from mmkd.training.build import StageInputs, run_stage
from mmkd.training.callbacks import Callback
from mmkd_models.layout import mamba_layers

NAME = "distill"
SELF = "self"
"""The student as it is before the call, as its own teacher."""


class StageSettings(TypedDict, total=False):
    """Keys of a recipe's stage, with the defaults that a recipe has; `docs/reference.md` describes
    them. One of `steps` and `epochs` is needed."""

    steps: int
    epochs: float
    batch: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    train: Sequence[str] | Mapping[str, Any]
    precision: str
    engine: Mapping[str, Any]
    balance_gradients: bool
    on_policy: Mapping[str, Any]
    image_tokens: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    validation: Mapping[str, Any]
    activation_checkpointing: bool


@dataclass(frozen=True)
class Distilled:
    """What a distillation has made.

    Attributes:
        student: the trained model, in eval mode; adapters are part of their layers.
        processor: the student's.
        metrics: of the last step, as in `metrics.jsonl`.
        history: metrics of every step.
        validation: of each time that held-out records were measured.
        folder: the folder that was written; None if there is none.
    """

    student: PreTrainedModel
    processor: Any
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    folder: Path | None


class History(Callback):
    """Keeps the metrics of all steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)

    def on_validation_end(self, step: int, metrics: dict[str, Any]) -> None:
        self.validations.append(metrics)


def distill(
    student: ModelLike,
    teacher: ModelLike | Literal["self"] | None,
    dataset: Any,
    objectives: Sequence[ObjectiveLike] = ("kl",),
    *,
    processor: Any = None,
    teacher_processor: Any = None,
    images: str | Path | None = None,
    held_out: Any = None,
    data: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    seed: int = 42,
    callbacks: Sequence[Callback] = (),
    **stage: Unpack[StageSettings],
) -> Distilled:
    """Train a student by one or more objectives, as one stage of a recipe does.

    With the same settings, records and seed, losses are those of `mmkd run`, bit for bit. A model
    in memory changes in place: the student trains, the teacher is frozen, and both move to the
    device of the stage. Random streams of the whole program start again with `seed`. Several
    processes (torchrun) each call it with the same models and records.

    Args:
        student: a model in memory, or a folder or Hub id.
        teacher: the same; "self" for the student as it is now; None where no objective needs one.
        dataset: a list of records, a `datasets.Dataset` or a torch data set with records by number;
            or what a recipe's `data.train` may be, such as a file. Records are mappings as
            `docs/data.md` describes them; images may be open Pillow images.
        objectives: kinds, such as "kl", or their keys as in a recipe.
        processor: the student's, loaded or its name; None for the one that came with the student.
        teacher_processor: the teacher's, in the same way.
        images: the folder that image paths are relative to.
        held_out: records to measure losses on: a share of the dataset such as 0.05, or as
            `dataset`.
        data: further keys of a recipe's `data`, such as `{"max_length": 1024}`.
        out: a new folder for student, metrics and checkpoints; None writes nothing that stays, and
            parameters that belong to objectives are lost.
        seed: of data order, dropout and new weights.
        callbacks: called at moments of the stage.
        stage: further keys of a recipe's stage: steps or epochs, batch, optimizer, train, ...

    Raises:
        RecipeError: a setting is unknown, or does not fit the models or the data.
        CheckpointError: a model or its processor cannot be used.
        DataError: a record is bad, or there is none.
        MmkdError: the processes do not have the same models and records, or are not connected as
            a launcher does it.
    """
    recipe = _recipe(student, teacher, objectives, seed, data, stage)
    records = data_of(dataset, images, held_out, data or {})
    recipe = recipe.model_copy(update={"data": records})
    [config] = recipe.stages
    _refuse(config, out)
    device = distributed.choose_device(config.engine.device)
    _connect(device, config)
    learner = load(student, processor, "student", recipe.student)
    check_processor(learner.processor)
    guide = _teacher(teacher, learner, teacher_processor, recipe)
    check_stage(_context(recipe, config, learner, guide))
    _check_same(learner.model, None if guide is None else guide.model)
    history = History()
    with ExitStack() as stack:
        folder = _folder(out, stack)
        before = learner.model.config._attn_implementation
        inputs = StageInputs(
            config=config if out is not None else _without_checkpoints(config),
            student=learner.model,
            processor=learner.processor,
            teachers=_placed(recipe, guide, device),
            data=records,
            folder=folder,
            seed=seed,
            callbacks=[history, *callbacks],
        )
        metrics = run_stage(inputs, write=out is not None)
    _finish(learner, config, before)
    place = None if out is None else folder
    steps = history.steps
    return Distilled(learner.model, learner.processor, metrics, steps, history.validations, place)


def _placed(recipe: Recipe, teacher: Loaded | None, device: torch.device) -> LoadedTeachers:
    """The teacher, ready to run. A student that teaches itself is copied with its stage."""
    if teacher is None or recipe.teacher is None:
        return LoadedTeachers()
    members: dict[str, Teacher] = {}
    if recipe.teacher.source != SELF:
        placed = place_teacher(teacher.model, recipe.teacher.placement, device)
        members[recipe.teacher.name] = placed
    return LoadedTeachers(members, recipe.teachers, teacher.processor)


def _recipe(
    student: ModelLike,
    teacher: ModelLike | str | None,
    objectives: Sequence[ObjectiveLike],
    seed: int,
    data: Mapping[str, Any] | None,
    stage: Mapping[str, Any],
) -> Recipe:
    """The recipe of a run that does the same; models and records in memory have names in it."""
    raw: dict[str, Any] = {"name": NAME, "seed": seed, "data": {"train": "dataset"}}
    raw["student"] = _named(student, "student")
    if teacher is not None:
        own = isinstance(teacher, str) and teacher == SELF
        raw["teacher"] = {"source": SELF} if own else _named(teacher, "teacher")
    entries = [objectives] if isinstance(objectives, str) else objectives
    raw["stages"] = [{"name": NAME, **stage, "objectives": [keys_of(o) for o in entries]}]
    return load_recipe(raw)


def _named(model: ModelLike, role: str) -> dict[str, str]:
    if isinstance(model, PreTrainedModel):
        return {"model": role, "dtype": dtype_name(model)}
    return {"model": str(model)}


def _refuse(config: StageConfig, out: str | Path | None) -> None:
    """Refuse what a stage of a recipe can do, and a call cannot."""
    where, named = "distill", Path(out) if out is not None else None
    if config.engine.kind != "torch":
        raise RecipeError(
            "DeepSpeed takes models apart, and a call gives the student back whole",
            where=f"{where}: engine",
            hint="leave it out, or write a recipe and call mmkd.run",
        )
    refused = {
        "convert": (config.convert, "call mmkd.convert first"),
        "data": (config.data, "use the arguments"),
        "rounds": (config.rounds > 1, "call it again with the student"),
    }
    for key, (given, hint) in refused.items():
        if given:
            what = "a call has no such key of a stage"
            raise RecipeError(what, where=f"{where}: {key}", hint=hint)
    if named is None and distributed.world_size() > 1:
        raise RecipeError(
            "several processes need a folder that all of them see", where=where, hint="give out="
        )
    if named is not None and named.exists() and (named.is_file() or any(named.iterdir())):
        raise RecipeError("the folder is not empty", where=str(named), hint="name a new folder")


def _connect(device: torch.device, config: StageConfig) -> None:
    """Join the launcher's process group.

    Raises:
        MmkdError: the program has made one of which the launcher's variables say nothing.
    """
    made = torch.distributed.is_available() and torch.distributed.is_initialized()
    if made and torch.distributed.get_world_size() != distributed.world_size():
        raise MmkdError(
            f"the process group has {torch.distributed.get_world_size()} processes, and WORLD_SIZE "
            f"says {distributed.world_size()}",
            where="distill",
            hint="start the program with torchrun, or set RANK and WORLD_SIZE in each process",
        )
    distributed.connect(device, timeout_s=config.engine.timeout_s)
    distributed.barrier()  # all have seen that `out` is empty


def _teacher(
    teacher: ModelLike | str | None, student: Loaded, processor: Any, recipe: Recipe
) -> Loaded | None:
    """
    Raises:
        RecipeError: it is the student, or shares weights with it.
    """
    if teacher is None:
        return None
    if isinstance(teacher, str) and teacher == SELF:
        return student
    if isinstance(teacher, PreTrainedModel):
        shared = shared_weights(teacher, student.model)
        if shared is not None:
            raise RecipeError(
                f"teacher and student have weights in common, first {shared}: the teacher would "
                "change while the student trains",
                where="distill: teacher",
                hint='give a copy, or teacher="self" for the student as it is now',
            )
    return load(teacher, processor, "teacher", recipe.teacher)


def _context(
    recipe: Recipe, config: StageConfig, student: Loaded, teacher: Loaded | None
) -> StageContext:
    """What the checks of a run look at."""
    mamba, attention = mamba_layers(student.model.config), attention_layers(student.model)
    theirs = attention_layers(teacher.model) if teacher is not None else []
    return StageContext(
        recipe=recipe,
        stage=config,
        objectives=[
            build_objective(
                o,
                mamba_layers=mamba,
                attention_layers=attention,
                teacher_attention_layers=theirs,
            )
            for o in config.objectives
        ],
        student=student.model,
        processor=student.processor,
        teacher=None if teacher is None else teacher.model,
        teacher_processor=None if teacher is None else teacher.processor,
    )


def _check_same(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """
    Raises:
        MmkdError: on all processes, if they have different models.
    """
    models = [student] if teacher is None else [student, teacher]
    sums = [sum(p.detach().double().sum().item() for p in m.parameters()) for m in models]
    if len(set(distributed.gather([repr(sums)]))) > 1:
        raise MmkdError(
            "the processes have different weights",
            where="distill",
            hint="load the same models in each, or seed what makes them",
        )


def _folder(out: str | Path | None, stack: ExitStack) -> Path:
    """Where the stage writes: `out`, or a folder that is removed again."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    return Path(stack.enter_context(TemporaryDirectory(prefix="mmkd-", ignore_cleanup_errors=True)))


def _without_checkpoints(config: StageConfig) -> StageConfig:
    """The stage without checkpoints, from which nobody could go on."""
    never = config.checkpoint.model_copy(update={"interval": 2**62})
    return config.model_copy(update={"checkpoint": never})


def _finish(learner: Loaded, config: StageConfig, attention: str) -> None:
    """Leave the student as a plain model: without adapters and settings of the trainer."""
    model: Any = learner.model
    if config.train.lora is not None:
        merge_adapters(model)
    if config.activation_checkpointing:
        model.activation_checkpointing_disable()
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    if model.generation_config is not None:
        set_ends(model.generation_config, learner.processor)
    model.eval()
