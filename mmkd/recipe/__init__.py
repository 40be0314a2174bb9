"""The recipe: all settings of a run, with their defaults.

A recipe is YAML. `extends: other.yaml` (relative to the file) merges the file over another recipe.
Overrides `key.path=value` are applied last. Unknown keys are errors that name the nearest known
key. Relative paths are resolved from the working directory first, then from the folder of the
recipe file: `mmkd.recipe.paths`.
"""

from mmkd.recipe.conversions import (
    CONVERSIONS,
    AnyConversionConfig,
    Conversion,
    ConversionConfig,
    DepthPruningConfig,
    EveryNth,
    FirstLayers,
    LastLayers,
    LayerSelection,
    MambaConfig,
    MambaInit,
    MoeConfig,
    NamedLayers,
    WidthPruningConfig,
    add_conversion,
)
from mmkd.recipe.evaluation import EvaluateConfig, SamplesConfig
from mmkd.recipe.load import load_recipe, load_release, load_student, load_written, to_yaml
from mmkd.recipe.models import (
    ImageSizeConfig,
    ModelConfig,
    Quantization,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TeacherPlacement,
    TrackerName,
)
from mmkd.recipe.release import ReleaseConfig
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
    "CONVERSIONS",
    "HUB",
    "STEP_METRICS",
    "TEACHER_KL",
    "VALIDATION_METRICS",
    "AnyConversionConfig",
    "BatchConfig",
    "Conversion",
    "ConversionConfig",
    "DataConfig",
    "DepthPruningConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EveryNth",
    "FirstLayers",
    "HeldOutConfig",
    "ImageSizeConfig",
    "LastLayers",
    "LayerSelection",
    "LoraConfig",
    "MambaConfig",
    "MambaInit",
    "ModelConfig",
    "MoeConfig",
    "NamedLayers",
    "OnPolicyConfig",
    "OptimizerConfig",
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
    "TeacherConfig",
    "TeacherPlacement",
    "TrackerName",
    "TrainConfig",
    "ValidationConfig",
    "WidthPruningConfig",
    "add_conversion",
    "load_recipe",
    "load_release",
    "load_student",
    "load_written",
    "to_yaml",
]
