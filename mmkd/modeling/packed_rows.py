"""Isolate the records of packed rows from each other, for each family of models.

Packed rows have position ids [B, T] that start again at 0 with each record, and no attention mask.
For most families this is enough: transformers makes a block-diagonal mask from the position ids.
Other families need more:

    M-RoPE (Qwen-VL)      position ids in time, height and width for each record, after a row of
                          plain position ids, from which the mask is made: [4, B, T]
    bidirectional images  masks for Gemma 3: in sliding-window layers, transformers would look for
                          image tokens at their positions in the record instead of the row
    linear attention,     each record in a sequence of its own
    short convolutions
    flash attention       sequence boundaries (cu_seq_lens), which transformers derives from
                          position ids only for a batch size of 1
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
"""Families with bidirectional attention between image tokens."""
RECURRENT = ("linear_attn", "conv")
"""Names of the token-mixing modules in decoder layers without attention."""


def isolate_packed_sequences(model: PreTrainedModel) -> None:
    """Install hooks that isolate packed sequences in every later forward pass of the families
    listed above. Forward passes without packing are unchanged.

    `mmkd.training.packing_check` verifies the result numerically for each model.
    """
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
    """Boundaries of the records in packed rows, and conversions between R packed rows of L tokens
    and N records of at most T tokens.

    Args:
        positions: [R, L], position ids, 0 at the first token of each record. Each row begins with a
            record.
    """

    def __init__(self, positions: Tensor):
        self.shape = positions.shape
        self._starts = (positions == 0).flatten()

    @property
    def sequence_ids(self) -> Tensor:
        """[R, L] int64: index of each token's record, from 1."""
        return self._starts.cumsum(0).view(self.shape)

    @cached_property
    def boundaries(self) -> Tensor:
        """[N + 1] int64: offsets of the records in the flattened rows, and the end of the last."""
        return torch.nn.functional.pad(
            self._starts.nonzero()[:, 0], (0, 1), value=len(self._starts)
        )

    @cached_property
    def longest(self) -> int:
        """T, the number of tokens of the longest record."""
        return int(self.boundaries.diff().max())

    @cached_property
    def real(self) -> Tensor:
        """[N, T] bool, False on padding."""
        places = torch.arange(self.longest, device=self.boundaries.device)
        return places < self.boundaries.diff()[:, None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[R, L, ...] -> [N, T, ...]: one record per row, padded with 0."""
        made = packed.new_zeros(*self.real.shape, *packed.shape[2:])
        return made.index_put(tuple(self.real.nonzero().T), packed.flatten(0, 1))

    def pack(self, unpacked: Tensor) -> Tensor:
        """[N, T, ...] -> [R, L, ...]."""
        return unpacked[self.real].unflatten(0, self.shape)


class PackedBoundaries:
    """The hooks of one model. They keep the boundaries of a forward pass until the next one,
    because activation checkpointing runs layers again in the backward pass.

    Args:
        both_ways: the model belongs to `BOTH_WAYS`.
    """

    def __init__(self, *, both_ways: bool):
        self.both_ways = both_ways
        self.rows: PackedRows | None = None

    def __call__(self, body: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the base model."""
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
        # Other inputs, such as flash attention's boundaries, describe the packed rows.
        return args, {"hidden_states": self.rows.unpack(inputs["hidden_states"])}

    def after_mixer(self, mixer: Any, args: Any, output: Tensor) -> Tensor:
        return output if self.rows is None else self.rows.pack(output)


def _packed_rows(inputs: dict[str, Any]) -> PackedRows | None:
    """The packed rows in the inputs, if there are any: position ids without a mask and a cache, the
    same condition as in transformers."""
    positions = inputs.get("position_ids")
    others = ("attention_mask", "cache", "past_key_values")
    if positions is None or any(inputs.get(name) is not None for name in others):
        return None
    return PackedRows(positions) if positions.ndim == 2 else None


def _mrope(body: Any, inputs: dict[str, Any], rows: PackedRows) -> Tensor:
    """[4, R, L]: plain position ids, and those in time, height and width."""
    plain = inputs["position_ids"]
    if "mm_token_type_ids" not in inputs:
        return plain.expand(4, -1, -1)
    known = inspect.signature(body.get_rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in known}
    given |= {name: rows.unpack(given[name]) for name in ("input_ids", "mm_token_type_ids")}
    found, _ = body.get_rope_index(**given | {"attention_mask": rows.real})  # [3, N, T]
    return torch.stack([plain, *map(rows.pack, found)])


def _both_way_masks(body: Any, inputs: dict[str, Any], rows: PackedRows) -> dict[str, Any]:
    """Attention masks by kind of layer. They are made from places in the row: within a record, the
    distances between tokens are the same as between their position ids."""
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
