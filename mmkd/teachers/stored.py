"""A teacher whose outputs were stored before; its weights are not needed."""

from collections.abc import Sequence

from mmkd.cache import Store
from mmkd.data.batch import Batch
from mmkd.errors import RecipeError
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import HeadObjectiveConfig, ObjectiveConfig, Signals, StoredSignals
from mmkd.recipe import StageConfig

LIVE = "set teacher.source to live"


class StoredTeacher:
    """Gives what the encoder has read from the cache beside each batch.

    Args:
        store: the cache.
    """

    spread = False

    def __init__(self, store: Store):
        self.store = store

    def signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> StoredSignals:
        """The distributions of a batch's rows; nothing of layers."""
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
    """A stage's objectives that read a teacher can do with what is stored of it.

    Args:
        stage: theirs.
        objectives: settings of those that read a teacher.
        hidden: final hidden states are stored too.

    Raises:
        RecipeError: one of them cannot.
    """
    for objective in objectives:
        where = f"stage {stage.name}: objective {objective.metric_name}"
        if objective.reads_hidden and not hidden:
            raise RecipeError(
                "the teacher's cache holds output distributions, it needs hidden states",
                where=where,
                mend="set 'hidden: true' in teacher.cache and build it, or teacher.source to live",
            )
        if not isinstance(objective, HeadObjectiveConfig) and not objective.reads_hidden:
            raise RecipeError(
                "a teacher's cache holds what its head sees and says, it needs more",
                where=where,
                mend=LIVE,
            )
        temperature = getattr(objective, "temperature", 1.0)
        if isinstance(objective, HeadObjectiveConfig) and temperature != 1:
            raise RecipeError(
                f"a teacher's cache is of temperature 1, it asks for {temperature:g}",
                where=where,
                mend=LIVE,
            )
    if objectives and stage.on_policy is not None:
        raise RecipeError(
            "the student's own answers are in no cache",
            where=f"stage {stage.name}: on_policy",
            mend=LIVE,
        )
