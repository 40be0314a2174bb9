"""Build an objective from its settings."""

from collections.abc import Sequence

from mmkd.objectives.affinity import Affinity
from mmkd.objectives.balance import Balance, RouterZ
from mmkd.objectives.base import Objective
from mmkd.objectives.base_settings import ObjectiveConfig
from mmkd.objectives.cross_tokenizer import Alm, Uld
from mmkd.objectives.divergence import DIVERGENCES
from mmkd.objectives.embedding import Embedding
from mmkd.objectives.exits import Exits
from mmkd.objectives.language_modeling import CrossEntropy
from mmkd.objectives.layerwise import HiddenMse, LayerL2, Matrix, MixerMse
from mmkd.objectives.minilm import MiniLm
from mmkd.objectives.mutual import Mutual
from mmkd.objectives.preference import Preference
from mmkd.objectives.registry import OBJECTIVES
from mmkd.objectives.relation import Relation
from mmkd.objectives.sinkhorn import Sinkhorn
from mmkd.objectives.token_labels import TokenLabels
from mmkd.ops import CHUNK_BYTES

CLASSES: tuple[type[Objective], ...] = (
    CrossEntropy,
    *DIVERGENCES,
    Sinkhorn,
    Exits,
    Alm,
    Uld,
    Relation,
    MiniLm,
    Affinity,
    Embedding,
    TokenLabels,
    Balance,
    RouterZ,
    Preference,
    MixerMse,
    LayerL2,
    HiddenMse,
    Mutual,
    Matrix,
)
REGISTRY: dict[str, type[Objective]] = {
    kind: cls for cls in CLASSES for kind in OBJECTIVES.kinds_of(cls)
}
"""mmkd's own objectives, by kind."""


def build_objective(
    config: ObjectiveConfig,
    *,
    shared_vocabulary: int | None = None,
    mamba_layers: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
    teacher_attention_layers: Sequence[int] = (),
    head_memory: int = CHUNK_BYTES,
    head_backend: str = "auto",
) -> Objective:
    """Build the objective of an entry of a recipe.

    Args:
        config: the entry.
        shared_vocabulary, mamba_layers, attention_layers, teacher_attention_layers, head_memory,
            head_backend: as in `Objective`.
    """
    kind: str = config.kind  # type: ignore[attr-defined]
    cls = REGISTRY.get(kind) or OBJECTIVES.find(kind)
    assert cls is not None  # its settings were read
    return cls(
        config,
        shared_vocabulary=shared_vocabulary,
        mamba_layers=mamba_layers,
        attention_layers=attention_layers,
        teacher_attention_layers=teacher_attention_layers,
        head_memory=head_memory,
        head_backend=head_backend,
    )
