"""From a stage's recipe and models to a stage that runs, and its run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from mmkd.data.encoder import Encoder
from mmkd.data.stream import BatchStream
from mmkd.data.vocabulary import same_vocabulary, shared_vocabulary
from mmkd.engines import build_engine
from mmkd.engines.deepspeed_config import resolve
from mmkd.modeling.packed_rows import tell_borders
from mmkd.objectives import Objective, Preference, build_objective
from mmkd.recipe import DataConfig, StageConfig, TeacherConfig
from mmkd.runtime import distributed
from mmkd.runtime.files import write_json
from mmkd.runtime.interrupt import deferred
from mmkd.runtime.run_folder import StageFolder
from mmkd.runtime.seeds import set_seed
from mmkd.students import set_trainable, write_student
from mmkd.teachers import (
    LiveReference,
    LiveTeacher,
    Reference,
    StoredTeacher,
    Teacher,
    ask_each,
    choose_reference,
    own_teacher,
    store,
)
from mmkd.training.callbacks import Callback
from mmkd.training.on_policy import OnPolicy
from mmkd.training.packing_check import check_packing
from mmkd.training.shared_vision import share_vision
from mmkd.training.stage import Metrics, Stage
from mmkd.training.trackers import Tracked
from mmkd.training.validation import build_validation
from mmkd_models.layout import mamba_layers

OWN: Literal["self"] = "self"


def build_stage(
    config: StageConfig,
    *,
    student: PreTrainedModel,
    processor: Any,
    teacher: Teacher | Literal["self"] | None,
    teacher_processor: Any,
    data: DataConfig,
    folder: Path,
    seed: int,
    teachers: Sequence[TeacherConfig] = (),
    others: Mapping[str, LiveTeacher] | None = None,
    tracked: Tracked | None = None,
    callbacks: Sequence[Callback] = (),
) -> Stage:
    """The stage, ready for its first step.

    Args:
        config: the stage.
        student: what trains; moved to the engine's device.
        processor: the student's processor.
        teacher: live or stored, "self" for the student as it is now, or None where no objective
            needs one.
        teacher_processor: the teacher's processor, or None.
        data: the records.
        folder: the stage's folder in the run directory.
        seed: of dropout and data order.
        teachers: the recipe's; of several, each objective on outputs asks each.
        others: all of them but the first, by name.
        tracked: the stage as its run's trackers see it, if they do.
        callbacks: called at moments of the stage.
    """
    set_seed(seed)
    device = distributed.choose_device(config.engine.device)
    alone = _objectives_of(config, student, processor, teacher_processor)
    objectives = ask_each(alone, teachers, data)
    others = {n: t for n, t in (others or {}).items() if any(o.teacher == n for o in objectives)}
    needs = frozenset().union(*(o.needs for o in objectives))

    def own() -> LiveTeacher:
        return own_teacher(student, device, only_adapters=_only_adapters(config))

    if teacher == OWN:
        teacher = own()
    live = teacher if isinstance(teacher, LiveTeacher) and "teacher" in needs else None
    stored = teacher if isinstance(teacher, StoredTeacher) and "teacher" in needs else None
    asked = [t for t in [live, *others.values()] if t is not None]
    encoder = Encoder.of(
        objectives,
        data,
        processor,
        teacher_processor=teacher_processor,
        filler=config.engine.kind == "deepspeed" or any(t.spread for t in asked),
        store=None if stored is None else stored.store,
        pack=config.batch.pack,
    )
    held_out = build_validation(
        config,
        alone,
        data=data,
        processor=processor,
        teacher_processor=teacher_processor,
        teachers=teachers,
        stored=None if stored is None else stored.store,
        filler=bool(encoder.filler),
        folder=folder,
        seed=seed,
    )
    stream = BatchStream(
        encoder,
        config.batch,
        seed=seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=data.workers,
    )
    steps = config.steps or stream.steps_in(config.epochs or 1.0)
    reference: Reference | None = choose_reference(objectives, live, own)
    if config.batch.pack is not None:
        for model in [student, *(t.model for t in asked)]:
            tell_borders(model)
        check_packing(encoder, student, asked, device)
    set_trainable(student, config.train.groups, config.train.lora)
    compared = any("teacher" in o.needs and not isinstance(o, Preference) for o in objectives)
    vision = None
    if live is not None and live.model is not student and compared and encoder.teacher is None:
        vision = share_vision(live, student)
    engine = build_engine(config, student, steps, device)
    if isinstance(reference, LiveReference) and reference.once:
        reference = store(reference, stream, steps, folder, engine.autocast)
    on_policy = None
    if config.on_policy is not None:
        ends = student.generation_config.eos_token_id
        on_policy = OnPolicy(config.on_policy, encoder, engine, seed, ends)
    return Stage(
        config=config,
        engine=engine,
        teacher=(live if compared else None) or stored,
        others=others,
        vision=vision,
        reference=reference,
        on_policy=on_policy,
        objectives=objectives,
        stream=stream,
        steps=steps,
        folder=folder,
        lead=teachers[0].name if teachers else "",
        tracked=tracked,
        validation=held_out,
        callbacks=callbacks,
    )


def _objectives_of(
    config: StageConfig, student: PreTrainedModel, processor: Any, teacher_processor: Any
) -> list[Objective]:
    """The stage's objectives, before there is one for each of several teachers."""
    shared = None
    if teacher_processor is not None:
        words = processor.tokenizer, teacher_processor.tokenizer
        shared = shared_vocabulary(*words) if same_vocabulary(*words) else None
    return [
        build_objective(
            o,
            shared_vocabulary=shared,
            mamba_layers=mamba_layers(student.config),
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


def run_stage(
    config: StageConfig,
    *,
    student: PreTrainedModel,
    processor: Any,
    folder: Path,
    write: bool = True,
    **settings: Any,
) -> Metrics:
    """Train `student` in place through one stage and write `folder/student` and `done.json`.

    Args:
        write: False leaves out both, and the student in memory is all that there is.
        config, student, processor, folder, settings: as in `build_stage`.
    """
    stage = build_stage(config, student=student, processor=processor, folder=folder, **settings)
    with deferred():  # a signal behind the last step must not lose it
        metrics = stage.train()
        steps = metrics.get("step", stage.steps)
        done = {"steps": steps, "metrics": metrics}
        if stage.validation is not None:
            done["validation"] = stage.validation.finish(stage.engine, steps)
        weights = stage.engine.weights()
        stage.engine.close()
        if stage.engine.rank == 0 and write:
            files = StageFolder(folder)
            write_student(student, processor, files.student, weights, config.train.lora)
            write_json(files.done, done)
        stage.engine.barrier()
    return metrics
