"""The recipe: what a user writes, and the one place that knows defaults.

A recipe is YAML. `extends: other.yaml` (relative to the file) merges over another recipe, dotted
`key.path=value` overrides come last, unknown keys are errors that name the nearest known one.
Relative paths in a recipe are tried from the working directory first, then from the folder of the
file that they are written in; `mmkd.recipe.paths` says more.
"""

from mmkd.recipe.conversions import (
    Conversion,
    Every,
    Head,
    LayersConversion,
    MambaConversion,
    MambaInit,
    MlpConversion,
    MoeConversion,
    Named,
    Placement,
    Tail,
)
from mmkd.recipe.load import load_recipe, load_release, load_student, to_yaml
from mmkd.recipe.models import (
    EvaluateConfig,
    ModelConfig,
    Quantization,
    Recipe,
    ReleaseConfig,
    SamplesConfig,
    StudentConfig,
    TeacherConfig,
    TeacherPlacement,
    TrackerName,
)
from mmkd.recipe.sources import HUB, DataConfig, HeldOutConfig, SourceConfig
from mmkd.recipe.stages import (
    ANSWER_CE,
    STEP_METRICS,
    TEACHER_KL,
    VALIDATION_METRICS,
    BatchConfig,
    EngineConfig,
    LoraConfig,
    OnPolicyConfig,
    OptimizerConfig,
    Precision,
    SamplingConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "ANSWER_CE",
    "HUB",
    "STEP_METRICS",
    "TEACHER_KL",
    "VALIDATION_METRICS",
    "BatchConfig",
    "Conversion",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "Every",
    "Head",
    "HeldOutConfig",
    "LayersConversion",
    "LoraConfig",
    "MambaConversion",
    "MambaInit",
    "MlpConversion",
    "ModelConfig",
    "MoeConversion",
    "Named",
    "OnPolicyConfig",
    "OptimizerConfig",
    "Placement",
    "Precision",
    "Quantization",
    "Recipe",
    "ReleaseConfig",
    "SamplesConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "StudentConfig",
    "Tail",
    "TeacherConfig",
    "TeacherPlacement",
    "TrackerName",
    "TrainConfig",
    "ValidationConfig",
    "load_recipe",
    "load_release",
    "load_student",
    "to_yaml",
]
