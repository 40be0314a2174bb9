"""From an objective's settings to the objective."""

from collections.abc import Sequence
from typing import get_args

from mmkd.errors import RecipeError, nearest
from mmkd.objectives.affinity import Affinity
from mmkd.objectives.balance import Balance, RouterZ
from mmkd.objectives.base import Need, Objective
from mmkd.objectives.cross_tokenizer import Alm, Uld
from mmkd.objectives.divergence import Divergence, Jsd, SkewDivergence
from mmkd.objectives.language_modeling import CrossEntropy
from mmkd.objectives.layerwise import HiddenMse, LayerL2, Matrix, MixerMse
from mmkd.objectives.minilm import MiniLm
from mmkd.objectives.preference import Preference
from mmkd.objectives.registry import find_added, kinds_of
from mmkd.objectives.relation import Relation
from mmkd.objectives.settings import ObjectiveConfig
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
REGISTRY: dict[str, type[Objective]] = {kind: cls for cls in CLASSES for kind in kinds_of(cls)}
"""mmkd's own objectives, by kind."""


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
