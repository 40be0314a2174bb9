"""Run a model's decoder on some of its tokens (`mmkd.ops.KeptTokens`).

Vision tower and connector run on the whole inputs, and the model computes position ids and masks
from them. A hook then gives the kept tokens to the decoder:

    embeddings           [B, T, H] -> [B, L, H]
    position ids         [B, T] or [axes, B, T]; decoders that count positions themselves get the
                         columns in the whole rows
    attention masks      padding masks [B, T], and masks of all pairs of tokens [B, 1, T, T], also
                         by kind of layer (Gemma 3)
    features for layers  at kept image tokens (DeepStack of Qwen3-VL)
    Mamba mixers         which tokens are padding

Attention between kept tokens is then what it is if all other tokens are masked out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import CheckpointError, RecipeError
from mmkd.ops import KeptTokens
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import find_parts
from mmkd_models.surgery import base_type

FAMILIES = (
    "gemma3",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "lfm3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
)
"""Families whose decoders have no further inputs for each token, as tests show."""
MASKS_OUTSIDE = ("gemma3",)
"""Families that make the masks of sliding-window layers outside of the decoder, from all tokens."""


def check_kept_inputs(model: PreTrainedModel, where: str) -> None:
    """Check that a model's decoder can run on some of its tokens.

    Args:
        model: may be on the meta device.
        where: for the message.

    Raises:
        RecipeError: it cannot.
    """
    family = base_type(model)
    if family not in FAMILIES:
        raise RecipeError(
            f"image tokens cannot be left out of models of the family {family}",
            where=where,
            hint=f"leave out image_tokens, or use one of {', '.join(FAMILIES)}",
        )
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    slides = getattr(text, "sliding_window", None) is not None and "sliding_attention" in kinds
    if slides and family not in MASKS_OUTSIDE:
        raise RecipeError(
            f"image tokens cannot be left out of {type(model).__name__} with sliding-window "
            "attention, whose window would reach farther",
            where=where,
            hint="leave out image_tokens, or use a model without sliding windows",
        )


@contextmanager
def kept_inputs(model: PreTrainedModel, kept: KeptTokens) -> Iterator[None]:
    """Context manager in which the decoder of a model runs on the kept tokens.

    Args:
        model: that `check_kept_inputs` accepts.
        kept: tokens of its inputs, which are padded on the right and not packed.
    """
    parts = find_parts(model)
    mixers = [m for m in parts.decoder_layers.modules() if isinstance(m, Mamba2Mixer)]

    def shorten(decoder: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        for mixer in mixers[:1]:  # all share one context
            mixer.context.real = kept.real
        return args, _shorter(inputs, kept)

    with hooked(parts.decoder, shorten):
        yield


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """Context manager with a forward pre-hook that gets keyword arguments."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _shorter(inputs: dict[str, Any], kept: KeptTokens) -> dict[str, Any]:
    """The decoder's inputs at the kept tokens.

    Raises:
        CheckpointError: there are tensors that this module does not know.
    """
    embeddings = inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    made = {
        "inputs_embeds": kept(embeddings),
        "position_ids": _positions(inputs.get("position_ids"), kept),
        # Not None: without a mask, gaps in position ids would be boundaries of packed rows.
        "attention_mask": kept.real.long() if mask is None else _mask(mask, kept),
    }
    images = inputs.get("visual_pos_masks")
    if images is not None:
        chosen = kept.keep(images.shape[1])[images]  # [N]
        features = inputs["deepstack_visual_embeds"]
        made["visual_pos_masks"] = kept(images) & kept.real
        made["deepstack_visual_embeds"] = [x[chosen] for x in features]  # each [N, H]
    for name in inputs.keys() - made.keys():
        if isinstance(inputs[name], Tensor | list | tuple | dict):
            raise CheckpointError(
                f"the decoder has an input {name!r}, which cannot be shortened",
                where="image_tokens",
                hint="leave out image_tokens",
            )
    return {**inputs, **made}


def _positions(positions: Tensor | None, kept: KeptTokens) -> Tensor:
    if positions is None:
        return kept.columns
    if positions.ndim == 2:
        return kept(positions.expand(len(kept.columns), -1))
    return torch.stack([kept(axis) for axis in positions])


def _mask(mask: Any, kept: KeptTokens) -> Any:
    """An attention mask for the kept tokens.

    Args:
        mask: [B, T], [B, 1, T, T], None for causal attention without padding, or a dictionary of
            these; bool, or zeros and the lowest number.
        kept: tokens of the same rows.
    """
    if isinstance(mask, dict):
        return {kind: _mask(one, kept) for kind, one in mask.items()}
    if mask is None:
        return None
    if mask.ndim == 2:
        return kept.real.to(mask.dtype)
    mask = kept(mask.transpose(1, 2)).transpose(1, 2)  # [B, 1, L, T]
    mask = kept(mask.transpose(1, 3)).transpose(1, 3)  # [B, 1, L, L]
    # Padding sees itself, because attention over nothing is not a number.
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    hidden = ~kept.real[:, None, None, :] & ~itself
    return mask.masked_fill(
        hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    )
