"""Build a stage from its settings and models, and run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.data.encoder import Encoder
from mmkd.data.image_tokens import ImageTokenDropout
from mmkd.data.records import Records
from mmkd.data.stream import BatchStream
from mmkd.data.vocabulary import same_vocabulary, shared_vocabulary
from mmkd.engines import Engine, build_engine
from mmkd.engines.deepspeed_config import resolve
from mmkd.modeling.layer_projections import attention_layers
from mmkd.modeling.packed_rows import isolate_packed_sequences
from mmkd.objectives import Objective, build_objective
from mmkd.objectives.gradient_norms import GradientNorms
from mmkd.recipe import DataConfig, StageConfig
from mmkd.runtime import distributed
from mmkd.runtime.files import write_json
from mmkd.runtime.interrupt import deferred
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import StageFolder
from mmkd.runtime.seeds import set_seed
from mmkd.students import set_trainable, write_student
from mmkd.teachers import (
    LiveReference,
    LoadedTeachers,
    Reference,
    TeacherSet,
    ask_each,
    choose_reference,
    compares,
    own_teacher,
    store,
)
from mmkd.training.callbacks import Callback
from mmkd.training.correction import Corrector, reads_distribution
from mmkd.training.domains import Domains, build_domains
from mmkd.training.objective_modules import GRADIENT_NORMS, build_own, write_own
from mmkd.training.on_policy import OnPolicy
from mmkd.training.packing_check import check_packing
from mmkd.training.shared_vision import SharedVision, share_vision
from mmkd.training.stage import Metrics, Stage
from mmkd.training.trackers import Tracked
from mmkd.training.validation_setup import build_validation
from mmkd_models.layout import mamba_layers


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """Everything from which a stage is built.

    Attributes:
        config: settings of the stage.
        student: is trained in place, and moved to the engine's device.
        processor: of the student.
        teachers: loaded teachers. The stage uses those that its objectives need.
        data: settings of the data.
        folder: of the stage, in the run's folder.
        seed: of dropout and data order.
        tracked: names the stage for trackers; None for no tracking.
        callbacks: are called during the stage.
    """

    config: StageConfig
    student: PreTrainedModel
    processor: Any
    teachers: LoadedTeachers
    data: DataConfig
    folder: Path
    seed: int
    tracked: Tracked | None = None
    callbacks: Sequence[Callback] = ()


def build_stage(inputs: StageInputs) -> Stage:
    """Build a stage that is ready for its first step."""
    config, student, teachers = inputs.config, inputs.student, inputs.teachers
    set_seed(inputs.seed)  # first, because new adapters and dropout use random numbers
    device = distributed.choose_device(config.engine.device)
    alone = _objectives_of(inputs)
    modules = build_own(alone, student, teachers.primary_model(student))
    objectives = ask_each(alone, teachers.settings, inputs.data, config.ensemble)
    norms = GradientNorms(objectives) if config.balance_gradients else None
    if norms is not None:
        modules[GRADIENT_NORMS] = norms  # for checkpoints
    # Before `_prepare_student`, because a copy of the student must not have adapters.
    own = cache(lambda: own_teacher(student, device, only_adapters=_only_adapters(config)))
    asked = teachers.for_stage(objectives, own)
    reference: Reference | None = choose_reference(objectives, asked, own)
    encoder = _encoder_of(inputs, objectives, asked)
    _say_left_out(encoder.records)
    held_out = build_validation(
        config,
        alone,
        encoder,
        teachers=teachers.settings,
        folder=inputs.folder,
        seed=inputs.seed,
    )
    stream = _stream_of(config, encoder, inputs.seed)
    steps = config.steps or stream.steps_in(config.epochs or 1.0)
    vision = _prepare_student(inputs, asked, objectives, encoder, device)
    engine = build_engine(config, student, steps, device, modules)
    # After the engine, which decides the precision.
    if isinstance(reference, LiveReference) and reference.once:
        reference = store(reference, stream, steps, inputs.folder, engine.autocast)
    return Stage(
        config=config,
        engine=engine,
        teachers=asked,
        vision=vision,
        reference=reference,
        on_policy=_on_policy_of(inputs, encoder, engine, asked, objectives),
        objectives=objectives,
        stream=stream,
        steps=steps,
        folder=inputs.folder,
        tracked=inputs.tracked,
        validation=held_out,
        domains=_domains_of(inputs, stream, engine, asked),
        norms=norms,
        image_tokens=_image_tokens_of(inputs, encoder),
        callbacks=inputs.callbacks,
    )


def _encoder_of(
    inputs: StageInputs, objectives: Sequence[Objective], teachers: TeacherSet
) -> Encoder:
    """The encoder of the stage. If a model is sharded over processes, each batch must have an
    image, at least a blank one, because all processes must run the vision tower."""
    config = inputs.config
    return Encoder.of(
        config.objectives,
        inputs.data,
        inputs.processor,
        teacher_processor=inputs.teachers.processor,
        filler=config.engine.kind == "deepspeed" or any(t.spread for t in teachers.live),
        store=teachers.store,
        pack=config.batch.pack,
        sources=any(o.sources is not None for o in objectives),
        sampled=config.samples_all,
    )


def _say_left_out(records: Records) -> None:
    """Log how many records of each source are left out."""
    for source in records.sources if distributed.rank() == 0 else []:
        if source.config.leave_out is not None:
            say(
                f"{source.config.label}: {source.left_out:,} of "
                f"{source.unfiltered:,} records are left out "
                f"({source.config.leave_out})"
            )


def _stream_of(config: StageConfig, encoder: Encoder, seed: int) -> BatchStream:
    """This process's share of the stage's batches."""
    return BatchStream(
        encoder,
        config.batch,
        seed=seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=encoder.config.workers,
    )


def _prepare_student(
    inputs: StageInputs,
    teachers: TeacherSet,
    objectives: Sequence[Objective],
    encoder: Encoder,
    device: torch.device,
) -> SharedVision | None:
    """Choose the trainable parameters, and check whether the vision tower can be shared with the
    primary teacher, so that it runs only once per batch.

    The order of these steps matters. All of them come before the engine, which may shard the
    weights. Packing is checked with full weights and without adapters. Towers are compared after
    trainable parameters were chosen.
    """
    config, student = inputs.config, inputs.student
    if config.batch.pack is not None:
        for model in [student, *(t.model for t in teachers.live)]:
            isolate_packed_sequences(model)
        check_packing(encoder, student, teachers.live, device)
    set_trainable(student, config.train.groups, config.train.lora)
    primary = teachers.primary_model
    if primary is None or primary.model is student or encoder.teacher is not None:
        return None
    return share_vision(primary, student) if any(map(compares, objectives)) else None


def _domains_of(
    inputs: StageInputs, stream: BatchStream, engine: Engine, teachers: TeacherSet
) -> Domains | None:
    """What sets the shares of the sources; None if they are fixed."""
    config = inputs.config
    return build_domains(
        stream.encoder,
        stream.moving,
        engine,
        teachers.primary_model,
        size=config.validation.size or config.batch.size,
        seed=inputs.seed,
        head_memory=config.engine.head_memory * 2**20,
        head_backend=config.engine.head_backend,
    )


def _on_policy_of(
    inputs: StageInputs,
    encoder: Encoder,
    engine: Engine,
    teachers: TeacherSet,
    objectives: Sequence[Objective],
) -> OnPolicy | None:
    """The sampler of the student's answers; None without `on_policy`."""
    config = inputs.config.on_policy
    if config is None:
        return None
    ends = inputs.student.generation_config.eos_token_id
    corrector = None
    if config.correct:
        reading = [o for o in objectives if reads_distribution(o)]
        corrector = Corrector(config, encoder, engine, teachers, reading, ends)
    return OnPolicy(config, encoder, engine, inputs.seed, ends, corrector)


def _image_tokens_of(inputs: StageInputs, encoder: Encoder) -> ImageTokenDropout | None:
    """The choice of image tokens that are left out; None without `image_tokens`."""
    config = inputs.config.image_tokens
    if config is None:
        return None
    return ImageTokenDropout(config.keep, inputs.seed, encoder.processing.image_token_id)


def _objectives_of(inputs: StageInputs) -> list[Objective]:
    """The stage's objectives, before they are copied for each of several teachers."""
    config, shared = inputs.config, None
    if inputs.teachers.processor is not None:
        words = inputs.processor.tokenizer, inputs.teachers.processor.tokenizer
        shared = shared_vocabulary(*words) if same_vocabulary(*words) else None
    teacher = inputs.teachers.primary_model(inputs.student)
    return [
        build_objective(
            o,
            shared_vocabulary=shared,
            mamba_layers=mamba_layers(inputs.student.config),
            attention_layers=attention_layers(inputs.student),
            teacher_attention_layers=[] if teacher is None else attention_layers(teacher),
            head_memory=config.engine.head_memory * 2**20,
            head_backend=config.engine.head_backend,
        )
        for o in config.objectives
    ]


def _only_adapters(config: StageConfig) -> bool:
    """Whether only adapters are trained, and weights are not sharded."""
    if config.train.lora is None or config.train.groups:
        return False
    if config.engine.kind == "torch":
        return True
    return resolve(config)["zero_optimization"]["stage"] < 3


def run_stage(inputs: StageInputs, *, write: bool = True) -> Metrics:
    """Train the student in place for one stage, and write `student` and `done.json` into the
    stage's folder.

    Args:
        inputs: everything from which the stage is built.
        write: False to write neither of the two.
    """
    stage = build_stage(inputs)
    with deferred():  # a signal after the last step must not prevent writing the student
        metrics = stage.train()
        steps = metrics.get("step", stage.steps)
        done = {"steps": steps, "metrics": metrics}
        if stage.validation is not None:
            done["validation"] = stage.validation.finish(stage.engine, steps)
        weights, own_weights = stage.engine.weights(), stage.engine.own_weights()
        stage.engine.close()
        if stage.engine.rank == 0 and write:
            files = StageFolder(inputs.folder)
            lora = inputs.config.train.lora
            write_student(inputs.student, inputs.processor, files.student, weights, lora)
            write_own(files.objectives, own_weights or {})
            write_json(files.done, done)
        stage.engine.barrier()
    return metrics
