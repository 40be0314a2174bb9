"""The config of a student: the config of its family, and the layout of the converted layers."""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

MODEL_TYPE = "mmkd"


class StudentConfigMixin:
    """Attributes of a student's config in addition to those of its family.

    Attributes:
        base_model_type: model_type of the family, such as llava or qwen2_5_vl.
        layout: the converted layers by kind of conversion, such as {"mamba": {...}}.
    """

    model_type = MODEL_TYPE
    # Every field is saved, so that a student's folder does not depend on the family's defaults.
    has_no_defaults_at_init = True
    _auto_class = "AutoConfig"
    base_model_type: str
    layout: dict[str, Any]


class MmkdConfig(PreTrainedConfig):
    """Reads a student's config.json. The result is a subclass of the family's config class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the config of a student.

        Raises:
            ValueError: the family is unknown to this version of transformers, or there is no
                layout.
        """
        family = str(config_dict.get("base_model_type"))
        if family not in CONFIG_MAPPING or not isinstance(config_dict.get("layout"), dict):
            raise ValueError(
                f"config.json: this version of transformers has no 'base_model_type' {family!r}, "
                "or 'layout' is missing"
            )
        made: Any = student_config_class(CONFIG_MAPPING[family])
        return made.from_dict(config_dict, **kwargs)


_classes: dict[Any, Any] = {}
# Only the installed package sets this. The copy of this file in a student folder must not register
# itself, because other students would then be loaded with its code.
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
