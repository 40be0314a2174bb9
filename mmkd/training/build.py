"""From a stage's recipe and models to a stage that runs, and its run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.data.encoder import Encoder
from mmkd.data.stream import BatchStream
from mmkd.data.vocabulary import same_vocabulary, shared_vocabulary
from mmkd.engines import Engine, build_engine
from mmkd.engines.deepspeed_config import resolve
from mmkd.modeling.packed_rows import tell_borders
from mmkd.objectives import Objective, build_objective
from mmkd.recipe import DataConfig, StageConfig
from mmkd.runtime import distributed
from mmkd.runtime.files import write_json
from mmkd.runtime.interrupt import deferred
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
from mmkd.training.on_policy import OnPolicy
from mmkd.training.packing_check import check_packing
from mmkd.training.shared_vision import SharedVision, share_vision
from mmkd.training.stage import Metrics, Stage
from mmkd.training.trackers import Tracked
from mmkd.training.validation_setup import build_validation
from mmkd_models.layout import mamba_layers


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """What a stage is built from.

    Attributes:
        config: the stage.
        student: the model that is trained, in place; moved to the engine's device.
        processor: the student's processor.
        teachers: loaded; those that the stage's objectives need are asked.
        data: the records.
        folder: the stage's folder in the run directory.
        seed: of dropout and data order.
        tracked: the stage as its run's trackers see it, if they do.
        callbacks: called at moments of the stage.
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
    """The stage, ready for its first step."""
    config, student, teachers = inputs.config, inputs.student, inputs.teachers
    set_seed(inputs.seed)  # first: new adapters and dropout draw from here on
    device = distributed.choose_device(config.engine.device)
    alone = _objectives_of(inputs)
    objectives = ask_each(alone, teachers.settings, inputs.data)
    # Before `_prepare_student`: the student as its own teacher is a copy without adapters.
    own = cache(lambda: own_teacher(student, device, only_adapters=_only_adapters(config)))
    asked = teachers.for_stage(objectives, own)
    reference: Reference | None = choose_reference(objectives, asked, own)
    encoder = _encoder_of(inputs, objectives, asked)
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
    engine = build_engine(config, student, steps, device)
    # After the engine, which says in what precision it runs.
    if isinstance(reference, LiveReference) and reference.once:
        reference = store(reference, stream, steps, inputs.folder, engine.autocast)
    return Stage(
        config=config,
        engine=engine,
        teachers=asked,
        vision=vision,
        reference=reference,
        on_policy=_on_policy_of(inputs, encoder, engine),
        objectives=objectives,
        stream=stream,
        steps=steps,
        folder=inputs.folder,
        tracked=inputs.tracked,
        validation=held_out,
        callbacks=inputs.callbacks,
    )


def _encoder_of(
    inputs: StageInputs, objectives: Sequence[Objective], teachers: TeacherSet
) -> Encoder:
    """What makes the stage's batches. Where processes run a model together, each needs a picture in
    every batch, at least a blank one."""
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
    """Choose what trains of the student, and find out whether its vision tower is the primary
    teacher's; then the tower runs once a batch.

    The order of these steps matters, and all come before the engine, which may spread the weights:
    packing is checked on the models as they were loaded, whole and without adapters; towers are
    compared once it is known which weights train.
    """
    config, student = inputs.config, inputs.student
    if config.batch.pack is not None:
        for model in [student, *(t.model for t in teachers.live)]:
            tell_borders(model)
        check_packing(encoder, student, teachers.live, device)
    set_trainable(student, config.train.groups, config.train.lora)
    primary = teachers.primary_model
    if primary is None or primary.model is student or encoder.teacher is not None:
        return None
    return share_vision(primary, student) if any(map(compares, objectives)) else None


def _on_policy_of(inputs: StageInputs, encoder: Encoder, engine: Engine) -> OnPolicy | None:
    """What samples the student's own answers, where the recipe wants them."""
    config = inputs.config.on_policy
    if config is None:
        return None
    ends = inputs.student.generation_config.eos_token_id
    return OnPolicy(config, encoder, engine, inputs.seed, ends)


def _objectives_of(inputs: StageInputs) -> list[Objective]:
    """The stage's objectives, before there is one for each of several teachers."""
    config, shared = inputs.config, None
    if inputs.teachers.processor is not None:
        words = inputs.processor.tokenizer, inputs.teachers.processor.tokenizer
        shared = shared_vocabulary(*words) if same_vocabulary(*words) else None
    return [
        build_objective(
            o,
            shared_vocabulary=shared,
            mamba_layers=mamba_layers(inputs.student.config),
            head_memory=config.engine.head_memory * 2**20,
            head_backend=config.engine.head_backend,
        )
        for o in config.objectives
    ]


def _only_adapters(config: StageConfig) -> bool:
    """Nothing but adapters trains, and each process has all other weights whole."""
    if config.train.lora is None or config.train.groups:
        return False
    if config.engine.kind == "torch":
        return True
    return resolve(config)["zero_optimization"]["stage"] < 3


def run_stage(inputs: StageInputs, *, write: bool = True) -> Metrics:
    """Train the student in place through one stage and write `student` and `done.json` into the
    stage's folder.

    Args:
        inputs: what the stage is built from.
        write: False leaves out both, and the student in memory is all that there is.
    """
    stage = build_stage(inputs)
    with deferred():  # a signal behind the last step must not lose it
        metrics = stage.train()
        steps = metrics.get("step", stage.steps)
        done = {"steps": steps, "metrics": metrics}
        if stage.validation is not None:
            done["validation"] = stage.validation.finish(stage.engine, steps)
        weights = stage.engine.weights()
        stage.engine.close()
        if stage.engine.rank == 0 and write:
            files = StageFolder(inputs.folder)
            lora = inputs.config.train.lora
            write_student(inputs.student, inputs.processor, files.student, weights, lora)
            write_json(files.done, done)
        stage.engine.barrier()
    return metrics
