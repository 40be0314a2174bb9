"""Objectives by kind. Each module holds one family: its equation, its settings, its code."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import (
    Field,
    SerializeAsAny,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from mmkd.errors import RecipeError, nearest
from mmkd.objectives.added import REGISTRY, add_objective, find_added, kinds_of
from mmkd.objectives.affinity import Affinity
from mmkd.objectives.balance import Balance, RouterZ, expert_counts
from mmkd.objectives.base import (
    LayerSignals,
    Need,
    Objective,
    ObjectiveConfig,
    Outcome,
    Region,
    RouterSignals,
    Signals,
    StoredSignals,
    Targets,
    TeacherSignals,
)
from mmkd.objectives.chunks import Chunks, ChunkTokens
from mmkd.objectives.cross_tokenizer import Alm, Uld
from mmkd.objectives.divergence import Divergence, Jsd, SkewDivergence
from mmkd.objectives.language_modeling import CrossEntropy
from mmkd.objectives.layerwise import HiddenMse, LayerL2, Layerwise, Matrix, MixerMse
from mmkd.objectives.minilm import MiniLm
from mmkd.objectives.preference import Preference, answer_logps, preference_loss
from mmkd.objectives.relation import Relation, visual_relation
from mmkd.objectives.together import HeadObjective, Teachers, score
from mmkd.objectives.token_labels import TokenLabels
from mmkd.ops import CHUNK_BYTES

CLASSES: tuple[type[Objective], ...] = (
    CrossEntropy,
    Divergence,
    Jsd,
    SkewDivergence,
    Alm,
    Uld,
    Relation,
    MiniLm,
    Affinity,
    TokenLabels,
    Balance,
    RouterZ,
    Preference,
    MixerMse,
    LayerL2,
    HiddenMse,
    Matrix,
)


REGISTRY.update({kind: cls for cls in CLASSES for kind in kinds_of(cls)})


def _with_added(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    """Settings of an objective from outside, else what `known` makes of them."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind in REGISTRY:
        return known(value)
    cls = find_added(kind)
    return known(value) if cls is None else cls.config_class.model_validate(value)


if TYPE_CHECKING:
    AnyObjectiveConfig = Any
else:
    AnyObjectiveConfig = Annotated[
        SerializeAsAny[Union[tuple(cls.config_class for cls in CLASSES)]],  # noqa: UP007
        Field(discriminator="kind"),
        WrapValidator(_with_added),
    ]


def build_objective(
    config: ObjectiveConfig,
    *,
    shared_vocabulary: int | None = None,
    mamba_layers: Sequence[int] = (),
    head_memory: int = CHUNK_BYTES,
    head_backend: str = "auto",
) -> Objective:
    """The objective that a recipe's entry asks for.

    Args:
        config: the entry.
        shared_vocabulary, mamba_layers: as in `Objective`.
        head_memory, head_backend: attributes of the objective.

    Raises:
        RecipeError: it needs what there is not.
    """
    kind: str = config.kind  # type: ignore[attr-defined]
    cls = REGISTRY.get(kind) or find_added(kind)
    assert cls is not None  # its settings were read
    made = cls(config, shared_vocabulary=shared_vocabulary, mamba_layers=mamba_layers)
    made.head_memory, made.head_backend = head_memory, head_backend
    for need in made.needs:
        if need not in get_args(Need):
            raise RecipeError(
                f"it needs {need!r}, which there is not",
                where=f"objective {made.name}",
                mend=nearest(str(need), get_args(Need)),
            )
    return made


__all__ = [
    "REGISTRY",
    "AnyObjectiveConfig",
    "ChunkTokens",
    "Chunks",
    "CrossEntropy",
    "HeadObjective",
    "LayerSignals",
    "Layerwise",
    "MiniLm",
    "Need",
    "Objective",
    "ObjectiveConfig",
    "Outcome",
    "Preference",
    "Region",
    "RouterSignals",
    "Signals",
    "StoredSignals",
    "Targets",
    "TeacherSignals",
    "Teachers",
    "add_objective",
    "answer_logps",
    "build_objective",
    "expert_counts",
    "find_added",
    "preference_loss",
    "score",
    "visual_relation",
]
