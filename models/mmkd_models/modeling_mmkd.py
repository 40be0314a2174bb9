"""A student as a Hugging Face model: its family's class with changed layers.

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

needs torch and transformers alone: the folder brings these files, and transformers runs them. After
`import mmkd_models`, which `import mmkd.modeling.loading` does too, the installed package is used
instead, and nothing in the folder is run.
"""

from typing import Any

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .cache import HybridCache
from .configuration_mmkd import MmkdConfig, StudentConfigMixin, student_config_class
from .layout import mamba_layers
from .surgery import apply_layout

# Decay and step size, and what experts are chosen by, lose too much in 8 bits of mantissa.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "D", "router")
# Arguments of from_pretrained that say where files come from: the config's are the weights'.
FROM_THE_HUB = (
    *("revision", "token", "subfolder", "cache_dir"),
    *("local_files_only", "force_download", "proxies"),
)


class StudentMixin:
    """What a student's class adds to its family's class."""

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
                "Mamba layers has its own cache, leave it out"
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
    """Loads a student; what it returns is a subclass of the family's own model class."""

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
        """A student of this config with random weights."""
        kwargs.pop("trust_remote_code", None)
        return student_class_of(config)._from_config(config, **kwargs)

    _from_config = from_config


def student_class_of(config: Any) -> Any:
    """The model class that a student's config asks for."""
    # transformers registers the class of a config that it has loaded from the Hub, beside families.
    families: Any = (c for c in type(config).__mro__ if not issubclass(c, StudentConfigMixin))
    family = next(c for c in families if c in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return student_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[family])


_classes: dict[Any, Any] = {}


def student_class(family: Any) -> Any:
    """The student's version of a family's model class."""
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
    """Make a family's model, whose layers were changed in place, the student's class in place."""
    config: Any = model.config
    if not isinstance(config, StudentConfigMixin):
        config.base_model_type = config.model_type
        config.__class__ = student_config_class(type(config))
        config.layout = {}
        model.__class__ = student_class(type(model))
        # Left by from_pretrained: saving would go back to the family's older weight names.
        model.__dict__.pop("_weight_conversions", None)
    config.layout = {**config.layout, **layout}
