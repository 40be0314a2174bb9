"""Load models and processors from a folder or the Hub, or build them from a config."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from mmkd.errors import CheckpointError, RecipeError
from mmkd.modeling.foreign_models import check_settings, refuse_kernels, refuse_pickled
from mmkd.modeling.image_sizes import limit_config, limit_processor
from mmkd.modeling.loading_errors import FOLDER, SAVE, first_sentence, one_line_errors
from mmkd.modeling.skeletons import copied, without_weights
from mmkd.recipe import ImageSizeConfig, ModelConfig, Quantization, TeacherConfig
from mmkd.runtime import consent, distributed, hub
from mmkd_models.configuration_mmkd import StudentConfigMixin
from mmkd_models.modeling_mmkd import MmkdForImageTextToText
from mmkd_models.parts import find_parts

CHECK = "check model_type and its settings"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(source: ModelConfig) -> Any:
    """The config of a model. No weights are loaded.

    Raises:
        CheckpointError: there is no such config, or it is damaged.
    """
    if source.config is None:
        name = source.model or ""
        with _explained(name, "model"):
            config = AutoConfig.from_pretrained(
                name, revision=source.revision, trust_remote_code=consent.granted(name)
            )
        refuse_kernels(config, name)
        limit_config(config, source.image_size, name)
        return config
    settings = dict(source.config)
    kind = settings.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"no such architecture ({first_sentence(error)})",
            where=f"config of {kind}",
            hint=CHECK,
        ) from error
    refuse_kernels(config, f"config of {kind}")
    limit_config(config, source.image_size, kind)
    return config


def load_model(source: ModelConfig) -> PreTrainedModel:
    """The model of a recipe, in its dtype and in eval mode.

    Raises:
        CheckpointError: the path is not a model folder, or its weights do not match its config.
    """
    dtype = DTYPES[source.dtype]
    if source.config is not None:
        config = load_config(source)
        with one_line_errors("config", "model", CHECK):
            model = AutoModelForImageTextToText.from_config(
                config,
                dtype=dtype,
                attn_implementation=source.attn_implementation,
                trust_remote_code=False,
            )
        return model.eval()
    return load_pretrained(
        source.model or "",
        dtype=dtype,
        revision=source.revision,
        attn_implementation=source.attn_implementation,
        quantize=quantization_of(source),
        image_size=source.image_size,
    )


def quantization_of(source: ModelConfig) -> Quantization | None:
    """The quantization of a model; None if its weights have its `dtype`."""
    return source.quantize if isinstance(source, TeacherConfig) else None


def skeleton(source: ModelConfig) -> PreTrainedModel:
    """The model on torch's `meta` device, without memory for its weights."""
    config = load_config(source)
    told = ("config", "model", CHECK) if source.model is None else (source.model, "model")

    def make() -> PreTrainedModel:
        with without_weights(), one_line_errors(*told):
            model: PreTrainedModel = model_class(config).from_config(
                config, dtype=DTYPES[source.dtype], trust_remote_code=consent.granted(source.model)
            )
        return model

    return copied(identity(source, config), make)


def identity(source: ModelConfig, config: Any) -> tuple[Any, ...]:
    """Key of the cache of models without weights: everything that such a model depends on.

    Args:
        source: the model.
        config: of `load_config`.
    """
    trusted = consent.granted(source.model)
    return type(config), repr(config.to_dict()), source.model, source.dtype, trusted


def model_class(config: Any) -> Any:
    """The class that loads a model of this config: an auto class of transformers, or mmkd's class
    for converted students."""
    student = isinstance(config, StudentConfigMixin)
    return MmkdForImageTextToText if student else AutoModelForImageTextToText


def load_processor(source: ModelConfig) -> Any:
    """The processor of a recipe's model, with its chat template."""
    return load_pretrained_processor(
        source.processor_source,
        revision=source.revision if source.processor is None else None,
        image_size=source.image_size,
    )


def load_pretrained(
    name: str,
    *,
    quantize: Quantization | None = None,
    image_size: ImageSizeConfig | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load a model from a folder or the Hub. Its weights must be safetensors, and must match its
    config exactly.

    Args:
        name: folder or Hub id.
        quantize: load the language model's linear layers in 4 or 8 bits, on this process's GPU.
        image_size: size of images, instead of the processor's own.
        trust_remote_code: run Python code from the model's repository (`mmkd.runtime.consent`).
        settings: further arguments of transformers' `from_pretrained`.

    Raises:
        CheckpointError: the path is not a model folder, or its weights do not match its config.
        RecipeError: this machine cannot load quantized models.
    """
    if quantize is not None:
        check_quantization(quantize, name, distributed.choose_device("auto"))
    trusted = trust_remote_code or consent.granted(name)
    refuse_pickled(Path(name))
    with _explained(name, "model", trusted):
        config = AutoConfig.from_pretrained(
            name, revision=settings.get("revision"), trust_remote_code=trusted
        )
    refuse_kernels(config, name)
    limit_config(config, image_size, name)
    with _explained(name, "model", trusted):
        if quantize is not None:
            settings |= _quantized(config, quantize, settings.get("dtype"))
        loaded: Any = model_class(config).from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error with a hint follows below
            trust_remote_code=trusted,
            **settings,
        )
    model, info = loaded
    lost: list[str] = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    lost += sorted(key for key, *_ in info["mismatched_keys"])
    if lost:
        raise CheckpointError(
            f"{len(lost)} weights are missing, unexpected or of another shape, such as {lost[0]}",
            where=name,
            hint="use the config that belongs to the weights",
        )
    return model.eval()


def check_quantization(quantize: Quantization, where: str, device: torch.device) -> None:
    """Check that this machine can load a quantized model.

    Raises:
        RecipeError: it has no GPU, or a package is missing.
    """
    missing = [p for p in ("bitsandbytes", "accelerate") if find_spec(p) is None]
    if device.type != "cuda":
        problem, hint = "a quantized model needs a GPU", "leave 'quantize' out"
    elif missing:
        problem, hint = f"{missing[0]} is not installed", f"pip install {missing[0]}"
    else:
        return
    raise RecipeError(f"cannot load a model in {quantize} ({problem})", where=where, hint=hint)


def _quantized(config: Any, quantize: Quantization, dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantized model. The head is not quantized, because
    objectives read its weight. The vision tower and the connector are small and not quantized
    either."""
    with torch.device("meta"):
        shell: Any = model_class(config).from_config(config)
    parts = find_parts(shell)
    inside = {id(m) for m in parts.decoder.modules()} - {id(parts.head)}
    whole = [n for n, m in shell.named_modules() if type(m) is nn.Linear and id(m) not in inside]
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    found = BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=whole,
    )
    device = distributed.choose_device("auto")
    return {"quantization_config": found, "device_map": {"": str(device)}}


def load_pretrained_processor(
    name: str,
    *,
    image_size: ImageSizeConfig | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Any:
    """Load a processor with an image processor and a chat template; arguments as in
    `load_pretrained`.

    Raises:
        CheckpointError: it cannot be loaded, or a part is missing.
    """
    trusted = trust_remote_code or consent.granted(name)
    with _explained(name, "processor", trusted):
        processor: Any = AutoProcessor.from_pretrained(name, trust_remote_code=trusted, **settings)
    if not hasattr(processor, "image_processor"):
        raise CheckpointError("the processor has no image processor", where=name, hint=SAVE)
    if not getattr(processor, "chat_template", None):
        raise CheckpointError(
            "the processor has no chat template",
            where=name,
            hint="add chat_template.jinja to its folder",
        )
    _give_pad_token(processor.tokenizer, name)
    limit_processor(processor, image_size, name)
    return processor


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer of a model alone; arguments as in `load_pretrained`. It needs no package
    for images.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    trusted = trust_remote_code or consent.granted(name)
    with _explained(name, "tokenizer", trusted):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)


def _give_pad_token(tokenizer: Any, name: str) -> None:
    """Set the pad token of a tokenizer that has none to another special token. Padding is masked,
    so any token can be used.

    Raises:
        CheckpointError: the tokenizer has no special token at all.
    """
    if tokenizer.pad_token is not None:
        return
    known = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    token = next((t for t in known if t is not None), None)
    if token is None:
        raise CheckpointError(
            "the tokenizer has no pad token, and no special token to use instead",
            where=name,
            hint="set pad_token in its tokenizer_config.json",
        )
    tokenizer.pad_token = token


@contextmanager
def _explained(name: str, what: str, trusted: bool = False) -> Iterator[None]:
    """Context manager that turns errors of transformers into one line, and refuses code without
    consent.

    Args:
        name: folder or Hub id that is loaded.
        what: "model", "processor" or "tokenizer".
        trusted: the caller allows the code of this folder.
    """
    folder = Path(name)
    marker = "config.json" if what == "model" else "*.json"
    if folder.is_dir() and not any(folder.glob(marker)):
        raise CheckpointError(f"the folder holds no {what}", where=name, hint=FOLDER)
    if not folder.exists() and (folder.is_absolute() or name.count("/") != 1):
        raise CheckpointError("no such model folder", where=name, hint=FOLDER)
    check_settings(folder)
    if not folder.exists():
        hub.unreachable()  # checked once here: the libraries would retry each file for minutes
    with one_line_errors(name, what), consent.guard(name, trusted=trusted):
        yield
    if not folder.exists():
        hub.say_if_unreachable(name)


def parameter_count(module: torch.nn.Module | None) -> int:
    """Number of parameters of a module, tied ones counted once; 0 for None."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
