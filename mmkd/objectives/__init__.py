"""Objectives by kind. Each module has the equation and the code of one family of objectives.

Importing this package does not import torch: a recipe needs only `settings`, `registry` and
`entry`. Other names are imported when they are first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmkd.objectives.base_settings import (
    GatheredObjectiveConfig,
    HeadObjectiveConfig,
    Need,
    ObjectiveConfig,
    OwnParametersConfig,
    Region,
)
from mmkd.objectives.entry import AnyObjectiveConfig
from mmkd.objectives.registry import OBJECTIVES, add_objective

if TYPE_CHECKING:
    from mmkd.objectives.balance import expert_counts
    from mmkd.objectives.base import DecoderParts, Objective, Outcome
    from mmkd.objectives.build import REGISTRY, build_objective
    from mmkd.objectives.chunks import Boundaries, Chunks, ChunkTokens
    from mmkd.objectives.gathered import Features, GatheredObjective
    from mmkd.objectives.language_modeling import CrossEntropy
    from mmkd.objectives.layerwise import Layerwise
    from mmkd.objectives.minilm import MiniLm
    from mmkd.objectives.preference import Preference, answer_logps, preference_loss
    from mmkd.objectives.relation import visual_relation
    from mmkd.objectives.scoring import HeadObjective, Teachers, score
    from mmkd.objectives.signals import (
        Exit,
        ExitSignals,
        LayerSignals,
        RouterSignals,
        Signals,
        StoredSignals,
        TeacherSignals,
    )
    from mmkd.objectives.targets import Targets

_MODULES = {
    "balance": ("expert_counts",),
    "base": ("DecoderParts", "Objective", "Outcome"),
    "build": ("REGISTRY", "build_objective"),
    "chunks": ("Boundaries", "Chunks", "ChunkTokens"),
    "gathered": ("Features", "GatheredObjective"),
    "language_modeling": ("CrossEntropy",),
    "layerwise": ("Layerwise",),
    "minilm": ("MiniLm",),
    "preference": ("Preference", "answer_logps", "preference_loss"),
    "relation": ("visual_relation",),
    "scoring": ("HeadObjective", "Teachers", "score"),
    "signals": (
        "Exit",
        "ExitSignals",
        "LayerSignals",
        "RouterSignals",
        "Signals",
        "StoredSignals",
        "TeacherSignals",
    ),
    "targets": ("Targets",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


__all__ = [
    "OBJECTIVES",
    "REGISTRY",
    "AnyObjectiveConfig",
    "Boundaries",
    "ChunkTokens",
    "Chunks",
    "CrossEntropy",
    "DecoderParts",
    "Exit",
    "ExitSignals",
    "Features",
    "GatheredObjective",
    "GatheredObjectiveConfig",
    "HeadObjective",
    "HeadObjectiveConfig",
    "LayerSignals",
    "Layerwise",
    "MiniLm",
    "Need",
    "Objective",
    "ObjectiveConfig",
    "Outcome",
    "OwnParametersConfig",
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
    "preference_loss",
    "score",
    "visual_relation",
]
