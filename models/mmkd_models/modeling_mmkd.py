"""The model classes of students: subclasses of their family's class, with converted layers.

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

needs torch and transformers only, because the folder contains these files and transformers runs
them. After `import mmkd_models`, which `import mmkd.modeling.loading` does too, the installed
package is used instead, and no code in the folder is run.
"""

from typing import Any

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .cache import HybridCache
from .configuration_mmkd import MmkdConfig, StudentConfigMixin, student_config_class
from .layout import mamba_layers
from .surgery import apply_layout

# Decay, step size and router weights need more precision than 16-bit dtypes have.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "D", "router")
# Arguments of from_pretrained about the location of files. The config is loaded with the same ones.
FROM_THE_HUB = (
    *("revision", "token", "subfolder", "cache_dir"),
    *("local_files_only", "force_download", "proxies"),
)


class StudentMixin:
    """Methods of a student's class in addition to those of its family's class."""

    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        apply_layout(self, config.layout)  # type: ignore[arg-type]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model: Any = self
        layers = mamba_layers(model.config)
        if not layers:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args, **kwargs
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r}: a student with "
                "Mamba layers has its own cache; leave it out"
            )
        given = [n for n in ("cache", "past_key_values") if model_kwargs.get(n) is not None]
        made = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        if not given and generation_config.use_cache is not False:
            name = "cache" if "cache" in model_kwargs else "past_key_values"
            model_kwargs[name] = HybridCache(model.config.get_text_config(decoder=True), layers)
        return made


class MmkdForImageTextToText(PreTrainedModel, GenerationMixin):
    """Loads students. The result is a subclass of the family's model class."""

    config_class = MmkdConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *inputs: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        if isinstance(config, PreTrainedConfig) and not isinstance(config, StudentConfigMixin):
            config = MmkdConfig.from_dict(config.to_dict())
        elif not isinstance(config, StudentConfigMixin):
            where = {k: kwargs[k] for k in FROM_THE_HUB if k in kwargs}
            config = MmkdConfig.from_pretrained(config or name, **where)
        return student_class_of(config).from_pretrained(name, *inputs, config=config, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Make a student with random weights."""
        kwargs.pop("trust_remote_code", None)
        return student_class_of(config)._from_config(config, **kwargs)

    _from_config = from_config


def student_class_of(config: Any) -> Any:
    """The model class for a student's config."""
    # transformers also registers config classes that it has loaded from the Hub as families.
    families: Any = (c for c in type(config).__mro__ if not issubclass(c, StudentConfigMixin))
    family = next(c for c in families if c in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return student_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[family])


_classes: dict[Any, Any] = {}


def student_class(family: Any) -> Any:
    """The model class of students of a family."""
    if family in _classes:
        return _classes[family]
    kept = set(getattr(family, "_keep_in_fp32_modules_strict", None) or ())
    namespace = {
        "__module__": __name__,
        "__qualname__": MmkdForImageTextToText.__name__,
        "config_class": student_config_class(family.config_class),
        "_keep_in_fp32_modules_strict": kept | set(FLOAT32_PARAMETERS),
    }
    made = type(MmkdForImageTextToText.__name__, (StudentMixin, family), namespace)
    return _classes.setdefault(family, made)


def become_student(model: PreTrainedModel, layout: dict[str, Any]) -> None:
    """Change the class of a converted model, in place, from its family's class to the student's."""
    config: Any = model.config
    if not isinstance(config, StudentConfigMixin):
        config.base_model_type = config.model_type
        config.__class__ = student_config_class(type(config))
        config.layout = {}
        model.__class__ = student_class(type(model))
        # from_pretrained sets it. Saving would use older weight names of the family.
        model.__dict__.pop("_weight_conversions", None)
    config.layout = {**config.layout, **layout}
