"""Models and processors from a folder, from the Hub, or from a config with random weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmkd.errors import CheckpointError
from mmkd.recipe import ModelConfig

transformers_logging.disable_progress_bar()  # loading takes moments, and runs have their own bars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(source: ModelConfig) -> Any:
    """The architecture's config, without weights."""
    if source.config is not None:
        settings = dict(source.config)
        kind = settings.pop("model_type")
        try:
            return AutoConfig.for_model(kind, **settings)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"no such architecture: {_reason(error)}", where=f"config of {kind}",
                mend="check model_type and its settings",
            ) from error  # fmt: skip
    name = source.model or ""
    with _named(name, "model"):
        return AutoConfig.from_pretrained(
            name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )


def load_model(source: ModelConfig, *, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A model in its dtype on its device, in eval mode.

    Raises:
        CheckpointError: the folder is none, or its weights do not fit its config.
    """
    dtype = DTYPES[source.dtype]
    if source.config is not None:
        model = AutoModelForImageTextToText.from_config(
            load_config(source), dtype=dtype, attn_implementation=source.attn_implementation
        )
        return model.to(device).eval()
    name = source.model or ""
    with _named(name, "model"):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=source.revision,
            dtype=dtype,
            attn_implementation=source.attn_implementation,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
    lost: list[str] = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if lost or info["mismatched_keys"]:
        example = lost[0] if lost else next(iter(info["mismatched_keys"]))[0]
        raise CheckpointError(
            f"the weights do not fit the config ({len(lost)} tensors missing or left over, "
            f"such as {example})",
            where=name,
            mend="use the config that belongs to the weights",
        )
    return model.to(device).eval()


def load_processor(source: ModelConfig) -> Any:
    """The processor with its chat template."""
    name = source.processor_source
    with _named(name, "processor"):
        return AutoProcessor.from_pretrained(
            name,
            revision=source.revision if source.processor is None else None,
            trust_remote_code=source.trust_remote_code,
        )


class _named:  # noqa: N801
    """Turn what transformers raises into one line that names the folder."""

    def __init__(self, name: str, what: str):
        self.name, self.what = name, what

    def __enter__(self) -> None:
        folder = Path(self.name)
        if folder.is_dir() and not any(folder.glob("*.json")):
            raise CheckpointError(
                f"the folder holds no {self.what}", where=self.name, mend="check the path"
            )

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, KeyError, ImportError, SafetensorError)):
            raise CheckpointError(
                f"cannot load the {self.what}: {_reason(error)}",
                where=self.name,
                mend="give a Hugging Face model folder or a reachable Hub id",
            ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """How many token ids student and teacher share, from id 0 without a gap.

    Heads are often padded to different sizes; rows past the shared tokens get no mass.

    Args:
        student, teacher: the two tokenizers.

    Raises:
        CheckpointError: an id stands for different tokens in the two.
    """
    mine, theirs = ({i: t for t, i in v.get_vocab().items()} for v in (student, teacher))
    differing = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
    shared = next(i for i in range(len(mine) + 1) if i not in mine or i not in theirs)
    lost = sum(i >= shared for i in mine) + sum(i >= shared for i in theirs)
    if differing or lost:
        at = differing[0] if differing else shared
        raise CheckpointError(
            f"the vocabularies differ: id {at} is {mine.get(at)!r} for the student and "
            f"{theirs.get(at)!r} for the teacher",
            where="teacher and student",
            mend="distil between models of one tokenizer family, or train with 'ce' alone",
        )
    return shared


def parameter_count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
