"""Models and processors from a folder, from the Hub, or from a config with random weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from mmkd.errors import CheckpointError
from mmkd.recipe import ModelConfig
from mmkd_models.configuration_mmkd import MODEL_TYPE, MmkdConfig, StudentConfigMixin
from mmkd_models.modeling_mmkd import MmkdForImageTextToText

# Students load by the installed code: what a folder brings is not run.
AutoConfig.register(MODEL_TYPE, MmkdConfig, exist_ok=True)
# transformers imports DeepSpeed where it is installed, and DeepSpeed prints that it found no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
transformers_logging.disable_progress_bar()  # loading takes moments, and runs have their own bars

FOLDER = "give a folder with config.json, safetensors and processor files, or a Hub id"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(source: ModelConfig) -> Any:
    """The architecture's config, without weights."""
    if source.config is None:
        name = source.model or ""
        with _explained(name, "model"):
            return AutoConfig.from_pretrained(
                name, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
    settings = dict(source.config)
    kind = settings.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"no such architecture ({_reason(error)})",
            where=f"config of {kind}",
            mend="check model_type and its settings",
        ) from error


def load_model(source: ModelConfig) -> PreTrainedModel:
    """The model of a recipe, in its dtype and in eval mode.

    Raises:
        CheckpointError: the folder is none, or its weights do not fit its config.
    """
    dtype = DTYPES[source.dtype]
    if source.config is not None:
        model = AutoModelForImageTextToText.from_config(
            load_config(source), dtype=dtype, attn_implementation=source.attn_implementation
        )
        return model.eval()
    return load_pretrained(
        source.model or "",
        dtype=dtype,
        revision=source.revision,
        attn_implementation=source.attn_implementation,
        trust_remote_code=source.trust_remote_code,
    )


def skeleton(source: ModelConfig) -> PreTrainedModel:
    """The model without storage for its weights: parameters are on torch's `meta` device."""
    with torch.device("meta"):
        config = load_config(source)
        return model_class(config).from_config(
            config, dtype=DTYPES[source.dtype], trust_remote_code=source.trust_remote_code
        )


def model_class(config: Any) -> Any:
    """What loads a model of this config: transformers, or for a student mmkd's own class."""
    student = isinstance(config, StudentConfigMixin)
    return MmkdForImageTextToText if student else AutoModelForImageTextToText


def load_processor(source: ModelConfig) -> Any:
    """The processor of a recipe's model, with its chat template."""
    return load_pretrained_processor(
        source.processor_source,
        revision=source.revision if source.processor is None else None,
        trust_remote_code=source.trust_remote_code,
    )


def load_pretrained(name: str, **settings: Any) -> PreTrainedModel:
    """A model from a folder or the Hub, every tensor accounted for; safetensors only.

    Raises:
        CheckpointError: the folder is none, or its weights do not fit its config.
    """
    where = {k: v for k, v in settings.items() if k in ("revision", "trust_remote_code")}
    with _explained(name, "model"):
        config = AutoConfig.from_pretrained(name, **where)
        loaded: Any = model_class(config).from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words
            **settings,
        )
    model, info = loaded
    lost: list[str] = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    lost += [key for key, *_ in info["mismatched_keys"]]
    if lost:
        raise CheckpointError(
            f"{len(lost)} weights are missing, left over or of another shape, first {lost[0]}",
            where=name,
            mend="use the config that belongs to the weights",
        )
    return model.eval()


def load_pretrained_processor(name: str, **settings: Any) -> Any:
    """The processor in a model's folder, with image processor and chat template."""
    with _explained(name, "processor"):
        processor: Any = AutoProcessor.from_pretrained(name, **settings)
    mend = "save the processor into the model's folder (processor.save_pretrained)"
    if not hasattr(processor, "image_processor"):
        raise CheckpointError("the processor reads no images", where=name, mend=mend)
    if not getattr(processor, "chat_template", None):
        raise CheckpointError(
            "the processor has no chat template",
            where=name,
            mend="add chat_template.jinja to its folder",
        )
    return processor


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn what the libraries raise for a bad folder into one line that names it."""
    folder = Path(name)
    marker = "config.json" if what == "model" else "*.json"
    if folder.is_dir() and not any(folder.glob(marker)):
        raise CheckpointError(f"the folder holds no {what}", where=name, mend=FOLDER)
    if not folder.exists() and (folder.is_absolute() or name.count("/") != 1):
        raise CheckpointError("no such model folder", where=name, mend=FOLDER)
    try:
        yield
    except Exception as error:  # a missing file and a broken one raise different types
        raise CheckpointError(
            f"cannot load the {what} ({_reason(error)})", where=name, mend=_mend(error)
        ) from error


def _mend(error: BaseException) -> str:
    """What to do about what transformers says."""
    if "num2words" in str(error):
        return "pip install num2words"
    wants = ("video processor", "torchvision")
    if not is_torchvision_available() and any(word in str(error).lower() for word in wants):
        return "install the torchvision that fits your torch: transformers reads pictures by it"
    return FOLDER


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def parameter_count(module: torch.nn.Module | None) -> int:
    """Parameters of a model or a part of it, shared ones counted once; 0 for None."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
