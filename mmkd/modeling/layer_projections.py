"""Queries, keys and values of a decoder layer, before the rotary embedding.

Forward hooks record the outputs of `q_proj`, `k_proj` and `v_proj`. After the forward pass, the
steps of the attention before its rotary embedding are repeated on them: the gate that `q_proj` of
some families contains is removed, and the attention's own norms are applied. For a Mamba mixer the
three are C, B and x before its convolution, with the norms that it has taken over from the
attention.
"""

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import find_parts

PROJECTIONS = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}
NORMS = {"queries": "q_norm", "keys": "k_norm", "values": "v_norm"}
# Attention classes whose q_proj returns, for each head, its query and then the gate of its output.
GATED = (
    "Qwen3NextAttention",
    "Qwen3_5Attention",
    "Qwen3_5MoeAttention",
    "Qwen4ExpTextAttention",
)
_NORM_NAME = re.compile(r"(^|_)(q|k|v|qk|kv|query|key|value)_.*norm")


def attention_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the decoder layers that have attention. Mamba mixers are not attention."""
    layers = (getattr(layer, "self_attn", None) for layer in find_parts(model).decoder_layers)
    return [
        index
        for index, attention in enumerate(layers)
        if hasattr(attention, "o_proj") and not isinstance(attention, Mamba2Mixer)
    ]


def as_compared(attention: Any, kind: str, projected: Tensor) -> Tensor:
    """Queries, keys or values from the output of their projection.

    Args:
        attention: an attention module, or a Mamba mixer.
        kind: "queries", "keys" or "values".
        projected: [B, T, D'], the projection's output.

    Returns:
        [B, T, D], after the attention's own norm and before the rotary embedding. D differs from D'
        if the projection also returns a gate.
    """
    if isinstance(attention, Mamba2Mixer):
        if kind == "values":
            return projected
        return attention.qk_normed(projected, NORMS[kind]).flatten(2)
    if kind == "queries" and _gated(attention):
        per_head = projected.unflatten(-1, (-1, 2 * attention.head_dim))  # [B, T, heads, 2 P]
        projected = per_head[..., : attention.head_dim].flatten(2)
    norm = getattr(attention, NORMS[kind], None)
    if norm is None:
        return projected
    if _covers_all_heads(norm, projected.shape[-1]):
        return norm(projected)
    return norm(projected.unflatten(-1, (-1, attention.head_dim))).flatten(2)


def width_of(attention: Any, kind: str) -> int:
    """D of `as_compared`, computed without a forward pass.

    Args:
        attention: an attention module, or a Mamba mixer.
        kind: "queries", "keys" or "values".

    Raises:
        ValueError: the queries, keys or values of this attention cannot be read; with the reason.
    """
    name, owner = PROJECTIONS[kind], type(attention).__name__
    width = getattr(getattr(attention, name, None), "out_features", None)
    if not isinstance(width, int):
        made = [n for n, m in attention.named_children() if isinstance(m, nn.Linear)]
        raise ValueError(
            f"{owner} has no separate {name} (it has {', '.join(made) or 'no projections'})"
        )
    if isinstance(attention, Mamba2Mixer):
        return width
    if kind != "queries" and getattr(attention, "is_kv_shared_layer", False):
        raise ValueError(f"{owner} takes its {kind} from another layer")
    for child, _ in attention.named_children():
        if _NORM_NAME.search(child) and child not in NORMS.values():
            raise ValueError(f"{owner} has an unknown norm: {child}")
    if getattr(attention, NORMS[kind], None) is not None and not hasattr(attention, "head_dim"):
        raise ValueError(f"{owner} has a {NORMS[kind]} and no head_dim")
    if kind == "queries":
        if _gated(attention):
            return width // 2
        _refuse_more_than_queries(attention)
    return width


def heads_of(attention: Any) -> int | None:
    """Number of heads of an attention's queries; None if it is not known, or if the keys are not
    heads of the same size.

    Args:
        attention: an attention module, or a Mamba mixer.
    """
    mixer = isinstance(attention, Mamba2Mixer)
    size = attention.d_state if mixer else getattr(attention, "head_dim", None)
    if not size:
        return None
    try:
        widths = [width_of(attention, kind) for kind in ("queries", "keys")]
    except ValueError:
        return None
    heads, key_heads = (width // size for width in widths)
    whole = all(width % size == 0 for width in widths) and key_heads > 0
    return heads if whole and heads % key_heads == 0 else None


def _refuse_more_than_queries(attention: Any) -> None:
    """Check that `q_proj` returns queries only, by comparing its width with that of the output."""
    size = getattr(attention, "head_dim", None)
    widths = [
        getattr(getattr(attention, n, None), "out_features", None)
        for n in ("q_proj", "k_proj", "v_proj")
    ]
    if not size or None in widths:
        return
    heads, kv_heads, values = widths[0] // size, widths[1] // size, widths[2]
    if heads * (values // max(1, kv_heads)) != attention.o_proj.in_features:
        raise ValueError(f"{type(attention).__name__} has a gate in its q_proj")


def _gated(attention: Any) -> bool:
    return any(cls.__name__ in GATED for cls in type(attention).__mro__)


def _covers_all_heads(norm: nn.Module, width: int) -> bool:
    """Whether a norm is computed over all heads together, instead of over each head."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return False
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO 3 replaces it with an empty tensor
    return len(shape) == 1 and shape[0] == width
