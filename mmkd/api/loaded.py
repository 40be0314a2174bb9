"""Models of a program: in memory, or named by a folder or a Hub id."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.data.vocabulary import check_head
from mmkd.errors import CheckpointError, MmkdError
from mmkd.modeling.capture import check_supported
from mmkd.modeling.loading import DTYPES, load_model, load_pretrained_processor, load_processor
from mmkd.modeling.own_tokens import check_own_tokens
from mmkd.recipe import ModelConfig

ModelLike = PreTrainedModel | str | Path
"""A model in memory, or the folder or Hub id of one."""


@dataclass(frozen=True)
class Loaded:
    """A model with its processor."""

    model: PreTrainedModel
    processor: Any


def load(model: ModelLike, processor: Any, role: str, config: ModelConfig | None) -> Loaded:
    """A model and its processor.

    Args:
        model: in memory, or a name.
        processor: a loaded one or the name of one; None for the one that came with the model.
        role: student or teacher.
        config: how to load a model that is named.

    Raises:
        CheckpointError: one of them cannot be loaded, they do not fit each other, or the family
            is not supported.
    """
    if isinstance(processor, str | Path):
        processor = load_pretrained_processor(str(processor))
    if isinstance(model, PreTrainedModel):
        check_supported(model, role)
        processor = processor or _beside(model, role)
    else:
        assert config is not None
        if processor is not None and config.model is not None:
            check_own_tokens(config.model, processor, role, revision=config.revision)
        processor = processor or load_processor(config)
        model = load_model(config)
        check_supported(model, role)
    check_head(model, processor.tokenizer, role)
    return Loaded(model, processor)


def _beside(model: PreTrainedModel, role: str) -> Any:
    """The processor in the folder or repository that a model in memory was loaded from."""
    argument = "processor" if role != "teacher" else f"{role}_processor"
    hint = f"give {argument}="
    if not model.name_or_path:
        raise CheckpointError(
            "the model was loaded from nowhere, so its processor is not known",
            where=role,
            hint=hint,
        )
    try:
        return load_pretrained_processor(model.name_or_path)
    except MmkdError as error:
        raise CheckpointError(
            f"its processor cannot be loaded from {model.name_or_path} ({error.what})",
            where=role,
            hint=hint,
        ) from error


def dtype_name(model: PreTrainedModel) -> str:
    """A model's dtype as recipes write it.

    Raises:
        CheckpointError: no recipe has it.
    """
    for name, dtype in DTYPES.items():
        if model.dtype == dtype:
            return name
    raise CheckpointError(
        f"its weights are {str(model.dtype).removeprefix('torch.')}",
        where=type(model).__name__,
        hint=f"convert it to {', '.join(DTYPES)}",
    )


def shared_weights(one: torch.nn.Module, other: torch.nn.Module) -> str | None:
    """The name of a weight that two models have in common; None if there is none."""
    places = {p.untyped_storage().data_ptr() for p in one.parameters() if p.numel()}
    shared = (n for n, p in other.named_parameters() if p.untyped_storage().data_ptr() in places)
    return next(shared, None)
