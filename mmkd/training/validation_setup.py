"""Build the validation of a stage, and check it before a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.cache import Store
from mmkd.data.encoder import Encoder
from mmkd.data.first_records import encoder_of
from mmkd.data.records import Records
from mmkd.data.vocabulary import same_vocabulary, shared_vocabulary
from mmkd.errors import RecipeError, nearest
from mmkd.objectives import Objective, ObjectiveConfig, Preference, build_objective
from mmkd.objectives.divergence_settings import CrossEntropyConfig, DivergenceConfig
from mmkd.recipe import (
    ANSWER_CE,
    TEACHER_KL,
    DataConfig,
    EnsembleConfig,
    StageConfig,
    TeacherConfig,
    ValidationConfig,
)
from mmkd.recipe.context import StageContext
from mmkd.teachers import ask_each, compares, limit_to_sources
from mmkd.training.validation import Validation, chosen


def build_validation(
    config: StageConfig,
    objectives: Sequence[Objective],
    encoder: Encoder,
    *,
    teachers: Sequence[TeacherConfig],
    folder: Path,
    seed: int,
) -> Validation | None:
    """Build the validation of a stage; None if no records are held out.

    Args:
        config: settings of the stage.
        objectives: of the stage, before they are copied for each of several teachers.
        encoder: of the training records. Held-out records are encoded in the same way.
        teachers: of the recipe.
        folder: of the stage.
        seed: of the stage.

    Raises:
        RecipeError: validation is not possible with these settings.
        DataError: the held-out records cannot be opened.
    """
    data = encoder.config
    if not _measures(config, objectives, data):
        return None
    named = data.model_copy(update={"train": None, "sources": data.validation_parts})
    asked = _asked(objectives, encoder, teachers, named, config.ensemble)
    _check_metric(config, asked)
    held_out = Encoder.of(
        [o.config for o in asked],
        data,
        encoder.processor,
        teacher_processor=_teacher_processor(encoder),
        records=Records(data, held_out=True),
        filler=bool(encoder.filler),
        store=encoder.store,
        pack=config.batch.pack,
        sources=any(o.sources is not None for o in asked),
    )
    return Validation(config, asked, held_out, folder, seed)


def _teacher_processor(encoder: Encoder) -> Any:
    """The processor of the teacher, if it differs from the student's; otherwise the student's."""
    return (encoder.teacher or encoder).processor


def _measures(config: StageConfig, objectives: Sequence[Objective], data: DataConfig) -> bool:
    """Whether a stage has validation.

    Raises:
        RecipeError: the settings of validation are not possible.
    """
    where = f"stage {config.name}: validation"
    if config.validation.interval is None:
        return False
    if data.validation is None:
        if config.validation == ValidationConfig():
            return False
        raise RecipeError(
            "no records are held out", where=where, hint="add 'validation' to data, a file or 0.05"
        )
    references = [o.config for o in objectives if isinstance(o, Preference)]
    if any(r.reference != "none" and r.reference_logps == "once" for r in references):
        raise RecipeError(
            "the reference of preferences is computed once, for training records only",
            where=where,
            hint="set reference_logps to live, or validation.interval to null",
        )
    return True


def _asked(
    objectives: Sequence[Objective],
    encoder: Encoder,
    teachers: Sequence[TeacherConfig],
    held_out: DataConfig,
    ensemble: EnsembleConfig | None,
) -> list[Objective]:
    """The objectives of a validation: those of the stage and additional metrics, for each of its
    teachers.

    Args:
        objectives, encoder, teachers: as in `build_validation`.
        held_out: the held-out records.
        ensemble: of the stage; the additional metrics are those of each teacher on its own.

    Raises:
        RecipeError: a teacher or an objective names a source that the held-out records do not have.
    """
    beside = _beside(objectives, encoder)
    try:
        if not any(o.config.compares_outputs for o in objectives):  # it has one teacher only
            return [*(limit_to_sources(o, held_out) for o in objectives), *beside]
        asked = ask_each(objectives, teachers, held_out, ensemble)
        return [*asked, *ask_each(beside, teachers, held_out)]
    except RecipeError as error:
        where = f"{error.where}, for data.validation"
        raise RecipeError(error.what, where=where, hint=error.hint) from error


def _check_metric(config: StageConfig, measured: Sequence[Objective]) -> None:
    names = ["loss", *(o.name for o in measured)]
    if config.validation.metric not in names:
        raise RecipeError(
            f"no metric {config.validation.metric!r}",
            where=f"stage {config.name}: validation.metric",
            hint=nearest(config.validation.metric, names),
        )


def _beside(objectives: Sequence[Objective], encoder: Encoder) -> list[Objective]:
    """Metrics in addition to a stage's objectives, as objectives with weight 0."""
    settings: list[ObjectiveConfig] = [CrossEntropyConfig(name=ANSWER_CE, weight=0)]
    shared = None
    compared = [o for o in objectives if compares(o)]
    by_token = any("chunks" not in o.needs for o in compared)
    store = encoder.store
    if compared and (store is None or "response" in store.manifest["regions"]):
        words = encoder.processor.tokenizer, _teacher_processor(encoder).tokenizer
        if same_vocabulary(*words) and (by_token or encoder.teacher is None):
            shared = shared_vocabulary(*words)
            settings.append(DivergenceConfig(kind="kl", name=TEACHER_KL, weight=0))
    memory, backend = objectives[0].head_memory, objectives[0].head_backend
    return [
        build_objective(s, shared_vocabulary=shared, head_memory=memory, head_backend=backend)
        for s in settings
    ]


def check_held_out(validation: Validation, store: Store | None) -> None:
    """Check that held-out records can be encoded. With a teacher's cache, all records of a
    validation are checked, because they must be in the cache; otherwise the first record of each
    source.

    Raises:
        DataError: a record cannot be encoded, or is not in the cache.
    """
    encoder = validation.encoder
    for first in encoder.records.starts if store is None else []:
        batch = encoder.encode([first])
        for objective in validation.objectives:
            objective.rows(batch.targets)
    for index in chosen(encoder, validation.config.records) if store is not None else []:
        encoder.encode([index])


def check_validation(context: StageContext) -> None:
    """Check that the held-out records can be measured; see `build_validation` and
    `check_held_out`."""
    validation = build_validation(
        context.stage,
        context.objectives,
        encoder_of(context),
        teachers=context.recipe.teachers,
        folder=Path(),
        seed=context.recipe.seed,
    )
    if validation is not None:
        check_held_out(validation, context.read_store)
