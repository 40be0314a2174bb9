"""Objectives by kind. Each module holds one family: its equation, its settings, its code."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field

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
from mmkd.objectives.together import HeadObjective, score
from mmkd.objectives.token_labels import TokenLabels

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


def kinds_of(cls: type[Objective]) -> tuple[str, ...]:
    return get_args(cls.config_class.model_fields["kind"].annotation)


REGISTRY: dict[str, type[Objective]] = {kind: cls for cls in CLASSES for kind in kinds_of(cls)}

if TYPE_CHECKING:
    AnyObjectiveConfig = Any
else:
    AnyObjectiveConfig = Annotated[
        Union[tuple(cls.config_class for cls in CLASSES)],  # noqa: UP007
        Field(discriminator="kind"),
    ]


def build_objective(
    config: ObjectiveConfig,
    *,
    shared_vocabulary: int | None = None,
    mamba_layers: Sequence[int] = (),
) -> Objective:
    """The objective that a recipe's entry asks for."""
    kind: str = config.kind  # type: ignore[attr-defined]
    return REGISTRY[kind](config, shared_vocabulary=shared_vocabulary, mamba_layers=mamba_layers)


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
    "answer_logps",
    "build_objective",
    "expert_counts",
    "preference_loss",
    "score",
    "visual_relation",
]
