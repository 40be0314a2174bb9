"""A teacher whose outputs are read from a cache. Its weights are not needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.cache import Store, processor_hash
from mmkd.data.batch import Batch
from mmkd.errors import RecipeError
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import ObjectiveConfig, Signals, StoredSignals
from mmkd.objectives.divergence_settings import DivergenceConfig
from mmkd.recipe import StageConfig, TeacherConfig
from mmkd.recipe.context import StageContext
from mmkd.runtime.hashes import weights_hash

LIVE = "set teacher.source to live"
AGAIN = "build it again with `mmkd cache`, or name another folder"


class StoredTeacher:
    """Returns the outputs that the encoder has read from the cache with each batch.

    Args:
        store: the cache.
    """

    spread = False

    def __init__(self, store: Store):
        self.store = store

    def signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> StoredSignals:
        """Stored distributions and hidden states for a batch; tensors of layers are not stored."""
        if batch.stored is None:
            raise ValueError("the batch was encoded without the teacher's cache")
        if batch.stored_hidden is None:
            return StoredSignals(batch.stored)
        hidden = batch.stored_hidden.float()
        weight, bias = (None if x is None else x.to(hidden.device) for x in self.store.head)
        assert weight is not None
        return StoredSignals(batch.stored, Signals(hidden, weight, bias))


def check_storable(
    stage: StageConfig, objectives: Sequence[ObjectiveConfig], *, hidden: bool = False
) -> None:
    """Check that a stage's objectives need only what a cache contains.

    Args:
        stage: of the objectives.
        objectives: settings of the objectives that need a teacher.
        hidden: the cache also contains final hidden states.

    Raises:
        RecipeError: an objective needs something else.
    """
    for objective in objectives:
        where = f"stage {stage.name}: objective {objective.metric_name}"
        if objective.reads_hidden and not hidden:
            raise RecipeError(
                "it needs hidden states, and the teacher's cache has output distributions only",
                where=where,
                hint="set 'hidden: true' in teacher.cache and build it, or teacher.source to live",
            )
        loss = objective.output_loss
        if loss is None and not objective.reads_hidden:
            raise RecipeError(
                "it needs tensors that a teacher's cache does not contain",
                where=where,
                hint=LIVE,
            )
        if isinstance(loss, DivergenceConfig) and loss.rest == "cell":
            _check_temperature(loss.temperature_of_teacher, where)
    if objectives and stage.on_policy is not None:
        raise RecipeError(
            "a teacher's cache does not contain the student's own answers",
            where=f"stage {stage.name}: on_policy",
            hint=LIVE,
        )


def _check_temperature(temperature: float, where: str) -> None:
    if temperature != 1:
        raise RecipeError(
            f"a teacher's cache has distributions at temperature 1, it needs {temperature:g}",
            where=where,
            hint=f"set 'rest: drop', which needs only the stored tokens, or {LIVE}",
        )


def open_store(teacher: TeacherConfig, processor: Any) -> Store:
    """Open a teacher's cache, and check that it is complete and belongs to this teacher and to the
    student's processor.

    Args:
        teacher: settings with `source: cache`.
        processor: of the student.

    Raises:
        CheckpointError: the cache is incomplete or damaged.
        RecipeError: it was built with another processor, other weights or another quantization.
    """
    assert teacher.cache is not None
    store = Store(Path(teacher.cache.folder))
    where = f"teacher.cache {store.folder}"
    if store.manifest["processor"] != processor_hash(processor):
        raise RecipeError(
            "it was built with a processor other than the student's", where=where, hint=AGAIN
        )
    held, asked = store.manifest["teacher"].get("quantize"), teacher.quantize
    if teacher.model is not None and held != asked:
        raise RecipeError(
            f"it was built with quantize {held or 'null'}, and the recipe has {asked or 'null'}",
            where=where,
            hint=AGAIN,
        )
    weights = weights_hash(teacher.model)
    if weights is not None and weights != store.manifest["teacher"]["weights"]:
        raise RecipeError(
            f"it was built from other weights than {teacher.model}", where=where, hint=AGAIN
        )
    return store


def check_stored(context: StageContext) -> None:
    """Check that the teacher's cache contains what the stage's objectives read.

    Raises:
        RecipeError: it does not.
    """
    store = context.store
    if store is None:
        return
    reading = context.needing("teacher")
    check_storable(context.stage, [o.config for o in reading], hidden=store.hidden is not None)
    held, length = store.manifest["max_length"], context.data.max_length
    for objective in reading:
        _check_tokens(objective.config.output_loss, store.manifest["k"], context.at(objective))
        regions, wanted = store.manifest["regions"], [getattr(objective.config, "region", None)]
        if objective.reads_hidden and store.hidden is not None:
            regions, wanted = store.hidden["regions"], [*objective.reads_hidden]
        if not {*wanted} <= {*regions} or length != held:
            raise RecipeError(
                f"the teacher's cache has regions {', '.join(regions)} at max_length {held}, not "
                f"{', '.join(map(str, wanted))} at {length}",
                where=context.at(objective),
                hint=AGAIN,
            )


def _check_tokens(loss: ObjectiveConfig | None, stored: int, where: str) -> None:
    if isinstance(loss, DivergenceConfig) and (loss.top_k or 1) > stored:
        raise RecipeError(
            f"the teacher's cache has {stored} tokens of a distribution, it needs {loss.top_k}",
            where=where,
            hint="lower top_k, or build the cache with a larger teacher.cache.k",
        )
