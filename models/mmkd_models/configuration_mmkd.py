"""The config of a student: its family's config, with the layout of what was changed."""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

MODEL_TYPE = "mmkd"


class StudentConfigMixin:
    """What a student's config has beside its family's settings.

    Attributes:
        base_model_type: the family, such as llava or qwen2_5_vl.
        layout: the changes by kind, such as {"mamba": {...}}.
    """

    model_type = MODEL_TYPE
    # Every field is written: a student's folder should not depend on the family's defaults.
    has_no_defaults_at_init = True
    _auto_class = "AutoConfig"
    base_model_type: str
    layout: dict[str, Any]


class MmkdConfig(PreTrainedConfig):
    """Reads a student's config.json; what it returns is a subclass of the family's own config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: the family is unknown to this version of transformers.
        """
        family = str(config_dict.get("base_model_type"))
        if family not in CONFIG_MAPPING or not isinstance(config_dict.get("layout"), dict):
            raise ValueError(
                f"config.json: 'base_model_type' {family!r} is no family of this transformers "
                "version, or 'layout' is missing"
            )
        made: Any = student_config_class(CONFIG_MAPPING[family])
        return made.from_dict(config_dict, **kwargs)


_classes: dict[Any, Any] = {}
# Set by the installed package alone. A copy of this file that came with a student must not register
# itself: other students would then be loaded by its code.
on_new_class: Callable[[Any, Any], None] | None = None


def student_config_class(family: Any) -> Any:
    """The student's version of a family's config class."""
    if family in _classes:
        return _classes[family]
    # Named like the class that auto_map points to: transformers compares the names.
    namespace = {"__module__": __name__, "__qualname__": MmkdConfig.__name__}
    made = type(MmkdConfig.__name__, (StudentConfigMixin, family), namespace)
    _classes[family] = made
    if on_new_class is not None:
        on_new_class(made, family)
    return made
