"""Encode the first record of each data source before a run starts."""

from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed
from mmkd.runtime.progress import say_once


def encoder_of(context: StageContext) -> Encoder:
    """The encoder of a stage's records."""
    return Encoder.of(
        context.stage.objectives,
        context.data,
        context.processor,
        teacher_processor=context.teacher_processor,
        store=context.read_store,
        sampled=context.stage.samples_all,
    )


def check_records(context: StageContext) -> None:
    """Check that the first record of each source can be encoded by the processors of student and
    teacher, and is in the teacher's cache.

    Raises:
        DataError: a record cannot be encoded, or is not in the cache.
        RecipeError: the sources cannot be mixed with these weights.
    """
    encoder = encoder_of(context)
    Mixture(encoder.records, context.recipe.seed)
    for source in encoder.records.sources:
        if source.selection is not None and distributed.rank() == 0:
            say_once(f"{context.where}: {source.config.label} {source.selection}")
    for first in encoder.records.starts:
        batch = encoder.encode([first])
        for objective in context.objectives:
            objective.rows(batch.targets)
