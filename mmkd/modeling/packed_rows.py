"""Tell a model where the records of packed rows begin, in the form that its family reads.

Packed rows come with positions [B, T] that start at 0 with every record, and without an attention
mask. For most families that is enough: transformers makes a block-diagonal mask of it. Here is what
the others need:

    M-RoPE (Qwen-VL)      positions in time, height and width, counted anew in each record, behind a
                          row of plain positions that the mask is made of: [4, B, T]
    both-way pictures     Gemma 3's masks: in layers with a sliding window transformers looks for a
                          picture's tokens at places of the record, not of the row
    linear attention,     their modules get each record in a row of its own
    short convolutions
    flash attention       the boundaries themselves, which it reads off positions of a single row
    only
"""

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    create_causal_mask,
    packed_sequence_mask_function,
    sliding_window_overlay,
)
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask
from transformers.utils.generic import is_flash_attention_requested

from mmkd_models.parts import find_parts
from mmkd_models.surgery import base_type

BOTH_WAYS = ("gemma3",)
"""Families whose image tokens see each other in both directions."""
RECURRENT = ("linear_attn", "conv")
"""What decoder layers without attention call the module that mixes tokens."""


def isolate_packed_sequences(model: PreTrainedModel) -> None:
    """Have every later forward of a model on packed rows keep their records apart, where this
    module knows how (`mmkd.training.packing_check` looks whether it does); other forwards stay as
    they are."""
    body = model.base_model
    if any(isinstance(hook, PackedBoundaries) for hook in body._forward_pre_hooks.values()):
        return
    parts = find_parts(model)
    boundaries = PackedBoundaries(both_ways=base_type(model) in BOTH_WAYS)
    body.register_forward_pre_hook(boundaries, with_kwargs=True)
    parts.decoder.register_forward_pre_hook(boundaries.before_decoder, with_kwargs=True)
    for layer in parts.decoder_layers:
        for name in RECURRENT:
            mixer = getattr(layer, name, None)
            if isinstance(mixer, nn.Module):
                mixer.register_forward_pre_hook(boundaries.before_mixer, with_kwargs=True)
                mixer.register_forward_hook(boundaries.after_mixer)


class PackedRows:
    """The records of packed rows, and tokens moved between the two.

    Args:
        positions: [R, L], 0 where a record begins, as it does at the beginning of each row.
    """

    def __init__(self, positions: Tensor):
        self.shape = positions.shape
        self._starts = (positions == 0).flatten()

    @property
    def sequence_ids(self) -> Tensor:
        """[R, L]: which record a token is of."""
        return self._starts.cumsum(0).view(self.shape)

    @cached_property
    def boundaries(self) -> Tensor:
        """[N + 1]: where records begin in the flattened rows, and where the last one ends."""
        return torch.nn.functional.pad(
            self._starts.nonzero()[:, 0], (0, 1), value=len(self._starts)
        )

    @cached_property
    def longest(self) -> int:
        """Tokens, T."""
        return int(self.boundaries.diff().max())

    @cached_property
    def real(self) -> Tensor:
        """[N, T] bool, False on padding."""
        places = torch.arange(self.longest, device=self.boundaries.device)
        return places < self.boundaries.diff()[:, None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[R, L, ...] -> [N, T, ...], each record in a row of its own, 0 on padding."""
        made = packed.new_zeros(*self.real.shape, *packed.shape[2:])
        return made.index_put(tuple(self.real.nonzero().T), packed.flatten(0, 1))

    def pack(self, unpacked: Tensor) -> Tensor:
        """[N, T, ...] -> [R, L, ...]."""
        return unpacked[self.real].unflatten(0, self.shape)


class PackedBoundaries:
    """Hooks of one model; what they know of a forward stays until the next one, since layers run
    again in the backward pass where activations are checkpointed.

    Args:
        both_ways: the model is of `BOTH_WAYS`.
    """

    def __init__(self, *, both_ways: bool):
        self.both_ways = both_ways
        self.rows: PackedRows | None = None

    def __call__(self, body: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the whole model."""
        self.rows = rows = _packed_rows(inputs)
        if rows is None:
            return args, inputs
        if hasattr(body, "get_rope_index"):
            inputs = {**inputs, "position_ids": _mrope(body, inputs, rows)}
        if self.both_ways and "token_type_ids" in inputs:
            inputs = {**inputs, "attention_mask": _both_way_masks(body, inputs, rows)}
        return args, inputs

    def before_decoder(
        self, decoder: Any, args: Any, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self.rows is not None and is_flash_attention_requested(decoder.config):
            boundaries, longest = self.rows.boundaries.int(), self.rows.longest
            inputs = {
                **inputs,
                **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), boundaries),
                **dict.fromkeys(("max_length_q", "max_length_k"), longest),
            }
        return args, inputs

    def before_mixer(
        self, mixer: Any, args: Any, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self.rows is None:
            return args, inputs
        # Boundaries of packed rows (flash attention's) are none of the rows that it gets.
        return args, {"hidden_states": self.rows.unpack(inputs["hidden_states"])}

    def after_mixer(self, mixer: Any, args: Any, output: Tensor) -> Tensor:
        return output if self.rows is None else self.rows.pack(output)


def _packed_rows(inputs: dict[str, Any]) -> PackedRows | None:
    """What transformers takes for packed rows too: positions without a mask, and no cache."""
    positions = inputs.get("position_ids")
    others = ("attention_mask", "cache", "past_key_values")
    if positions is None or any(inputs.get(name) is not None for name in others):
        return None
    return PackedRows(positions) if positions.ndim == 2 else None


def _mrope(body: Any, inputs: dict[str, Any], rows: PackedRows) -> Tensor:
    """[4, R, L]: plain positions, and those in time, height and width."""
    plain = inputs["position_ids"]
    if "mm_token_type_ids" not in inputs:
        return plain.expand(4, -1, -1)
    known = inspect.signature(body.get_rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in known}
    given |= {name: rows.unpack(given[name]) for name in ("input_ids", "mm_token_type_ids")}
    found, _ = body.get_rope_index(**given | {"attention_mask": rows.real})  # [3, N, T]
    return torch.stack([plain, *map(rows.pack, found)])


def _both_way_masks(body: Any, inputs: dict[str, Any], rows: PackedRows) -> dict[str, Any]:
    """Masks by the kind of layer. Within a record distances are the same in positions and places,
    so all of them are made in places of the row."""
    config = body.config.get_text_config()
    weight = body.get_input_embeddings().weight
    blocks = get_block_sequence_ids_for_mask(inputs["token_type_ids"])
    same = packed_sequence_mask_function(rows.sequence_ids)

    def mask(*conditions: Any) -> Any:
        return create_causal_mask(
            config,
            weight.new_empty(*rows.shape, 0),  # for shape, dtype and device
            attention_mask=None,
            cache=None,
            or_mask_function=blockwise_overlay(blocks),
            and_mask_function=and_masks(same, *conditions),
        )

    return {
        "full_attention": mask(),
        "sliding_attention": mask(sliding_window_overlay(config.sliding_window)),
    }
