"""A cache for the attention and Mamba layers of a student.

The cache of transformers reads its length from the first attention layer. Here every layer stores
the length, so that students without attention work too.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

GROWTH = 1.5
FIRST_CAPACITY = 64


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer that grows by half when it is full, instead of concatenation at
    each token."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, H, T, D]; returns the keys and values of all tokens."""
        if key_states.requires_grad or value_states.requires_grad:
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < past + new:
            capacity = max(int((past + new) * GROWTH), FIRST_CAPACITY)
            self._buffers = (
                _grown(self.keys, key_states, past, capacity),
                _grown(self.values, value_states, past, capacity),
            )
        keys, values = self._buffers
        keys[..., past : past + new, :] = key_states
        values[..., past : past + new, :] = value_states
        self.keys, self.values = keys[..., : past + new, :], values[..., : past + new, :]
        return self.keys, self.values

    # These methods replace keys and values, so the buffer is dropped.

    def crop(self, tokens_to_remove: int) -> None:
        self._buffers = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self._buffers = None
        super().reset()

    def offload(self) -> None:
        self._buffers = None
        super().offload()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._buffers = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._buffers = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = None
        super().batch_select_indices(indices)


def _grown(held: Tensor | None, like: Tensor, length: int, capacity: int) -> Tensor:
    buffer = like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
    if held is not None and length:
        buffer[..., :length, :] = held
    return buffer


class MambaLayer(CacheLayerMixin):
    """States of one Mamba mixer, which do not grow with the length, and the number of tokens.

    Attributes:
        conv_state: [B, C, K - 1], the last inputs of the convolution.
        ssm_state: [B, H, P, N], float32.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.conv_state: Tensor | None = None
        self.ssm_state: Tensor | None = None
        self.tokens = 0

    def advance(self, conv_state: Tensor, ssm_state: Tensor, tokens: int) -> None:
        """Store the states after `tokens` further tokens."""
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self.tokens += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("a Mamba layer has states instead of keys and values")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise ValueError("a Mamba layer has states instead of keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a Mamba state cannot be cropped, so assisted decoding does not work")

    def reset(self) -> None:
        self.conv_state = self.ssm_state = None
        self.tokens, self.is_initialized = 0, False

    def offload(self) -> None:
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        pass  # the mixer moves its small states to the device of its input

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def _map(self, change: Any) -> None:
        if self.conv_state is not None and self.ssm_state is not None:
            self.conv_state, self.ssm_state = change(self.conv_state), change(self.ssm_state)


class HybridCache(Cache):
    """Cache of a hybrid student: keys and values of attention layers, states of Mamba layers.

    Args:
        config: of the text decoder.
        mamba_layers: indices of the Mamba layers.
    """

    def __init__(self, config: PreTrainedConfig, mamba_layers: tuple[int, ...]):
        layers: list[Any] = DynamicCache(config=config).layers
        layers = layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
        for index, layer in enumerate(layers):
            if index in mamba_layers:
                layers[index] = MambaLayer()
            elif type(layer) is DynamicLayer:
                layers[index] = GrowingLayer()
        super().__init__(layers=layers)
        self.mamba_layers = mamba_layers


def cache_bytes(cache: Cache) -> int:
    """Bytes of the states, keys and values in use, without the unused part of buffers."""
    names = ("keys", "values", "conv_state", "ssm_state")
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
