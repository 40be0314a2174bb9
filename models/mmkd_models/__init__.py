"""The model code of converted students. It needs torch and transformers only, not mmkd.

    import mmkd_models
    AutoModelForImageTextToText.from_pretrained(folder)

The import registers students with transformers' auto classes. From then on students are loaded with
this package, also with `trust_remote_code=True`: the Python files in their folders are not run.
"""

from importlib.util import find_spec
from typing import Any

# Scan, convolution and experts work without transformers.
if find_spec("transformers") is not None:
    from transformers import AutoConfig

    from . import configuration_mmkd
    from .configuration_mmkd import MODEL_TYPE, MmkdConfig

    def _register_model(config_class: Any, family: Any) -> None:
        """Register the model class of a new student's config class with transformers."""
        from transformers import AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        from .modeling_mmkd import student_class

        if family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            model_class = student_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[family])
            AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)

    configuration_mmkd.on_new_class = _register_model
    AutoConfig.register(MODEL_TYPE, MmkdConfig, exist_ok=True)
