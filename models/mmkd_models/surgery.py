"""Replace attention with Mamba-2 mixers, and feed-forward networks with experts, in any model whose
decoder layers have a `self_attn` and an `mlp` or `feed_forward`."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .cache import HybridCache
from .layout import MambaLayout, MoeLayout
from .mixer import Mamba2Mixer, SequenceContext
from .moe import SparseFfn
from .parts import FEED_FORWARD, feed_forward, find_parts

# Families with bidirectional attention over the prompt, which a causal mixer cannot replace.
PREFIX_ATTENTION = ("paligemma",)


def apply_layout(model: PreTrainedModel, layout: dict[str, Any]) -> None:
    """Convert a model, in place, to the structure of a layout. New weights are random.

    Raises:
        ValueError: the layout is unknown or does not fit the model.
    """
    if unknown := set(layout) - {"mamba", "moe"}:
        raise ValueError(f"layout: unknown kind {min(unknown)!r}")
    if "mamba" in layout:
        replace_attention(model, MambaLayout.from_dict(layout["mamba"]))
    if "moe" in layout:
        replace_ffn(model, MoeLayout.from_dict(layout["moe"]))


def replace_ffn(model: PreTrainedModel, layout: MoeLayout) -> dict[int, nn.Module]:
    """Replace the feed-forward networks of a layout's layers with experts with random weights, in
    place.

    Returns:
        The replaced networks by layer.

    Raises:
        ValueError: the layout does not fit the model, or a layer has no network to copy.
    """
    layers = _layers_for(model, layout.layers)
    made: dict[int, tuple[str, nn.Module]] = {}
    for index in layout.layers:
        name, network = feed_forward(layers[index])
        try:
            if network is None:
                raise ValueError(f"it has no {' or '.join(FEED_FORWARD)}")
            made[index] = name, SparseFfn(network, layout)
        except ValueError as error:
            raise ValueError(f"decoder layer {index} cannot become sparse: {error}") from error
    return _swap(layers, made)


def _swap(layers: nn.ModuleList, made: Mapping[int, tuple[str, nn.Module]]) -> dict[int, nn.Module]:
    """Replace modules of layers, and return the old ones, both by layer."""
    replaced: dict[int, nn.Module] = {}
    for index, (name, module) in made.items():
        replaced[index] = getattr(layers[index], name)
        setattr(layers[index], name, module.train(replaced[index].training))
    return replaced


def _layers_for(model: PreTrainedModel, chosen: tuple[int, ...]) -> nn.ModuleList:
    """The decoder's layers. Raises ValueError if it lacks one of the chosen layers."""
    layers = find_parts(model).decoder_layers
    outside = [i for i in chosen if i >= len(layers)]
    if outside:
        raise ValueError(f"layout: layer {outside[0]} of a model with {len(layers)} layers")
    return layers


def replace_attention(model: PreTrainedModel, layout: MambaLayout) -> dict[int, nn.Module]:
    """Replace the attention of a layout's layers with mixers with default initialisation, in place.

    Layers that are mixers already are not changed.

    Returns:
        The replaced attention modules by layer.

    Raises:
        ValueError: the layout does not fit the model, or a mixer cannot replace an attention.
    """
    if base_type(model) in PREFIX_ATTENTION:
        raise ValueError(
            f"the attention of {base_type(model)} over image and prompt is bidirectional, and a "
            "Mamba mixer is causal"
        )
    layers = _layers_for(model, layout.layers)
    present = _present_mixers(layers, layout)
    context = next(iter(present.values())).context if present else SequenceContext()
    mixers: dict[int, tuple[str, nn.Module]] = {}
    for index in layout.layers:
        if index in present:
            continue
        attention = getattr(layers[index], "self_attn", None)
        if not isinstance(attention, nn.Module):
            raise ValueError(f"decoder layer {index} cannot be converted: it has no self_attn")
        try:
            mixers[index] = "self_attn", Mamba2Mixer(attention, layout, index, context)
        except ValueError as error:
            raise ValueError(f"decoder layer {index} cannot be converted: {error}") from error
    replaced = _swap(layers, mixers)
    context.mamba_layers = layout.layers
    if not present:
        watch = _Watch(model, context)
        model.base_model.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
    return replaced


def _present_mixers(layers: nn.ModuleList, layout: MambaLayout) -> dict[int, Mamba2Mixer]:
    """The existing mixers of a student. Raises ValueError if they do not fit the layout."""
    found: dict[int, Mamba2Mixer] = {}
    for i, layer in enumerate(layers):
        mixer = getattr(layer, "self_attn", None)
        if isinstance(mixer, Mamba2Mixer):
            found[i] = mixer
    for index, mixer in found.items():
        if index not in layout.layers:
            raise ValueError(
                f"decoder layer {index} cannot keep its attention: it is Mamba already"
            )
        if other := mixer.layout.differences(layout):
            raise ValueError(
                f"layout: {other[0]} {getattr(layout, other[0])!r}, but layer {index} is Mamba "
                f"already with {getattr(mixer.layout, other[0])!r}"
            )
    return found


def base_type(model: PreTrainedModel) -> str:
    """The model_type of a model's family, also for a student."""
    return getattr(model.config, "base_model_type", None) or model.config.model_type


class _Watch:
    """Hooks that set the mixers' context, and provide a `HybridCache` for each forward pass with a
    cache."""

    def __init__(self, model: PreTrainedModel, context: SequenceContext):
        self.context = context
        self.config = model.config.get_text_config(decoder=True)
        parameters = inspect.signature(model.base_model.forward).parameters
        # transformers 5.2x calls it cache, before that it was past_key_values
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        length = tokens.shape[1]
        cache = self._cache(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        mask = kwargs.get("attention_mask")
        self.context.real = self._real(mask, length) if past == 0 or length > 1 else None
        self.context.documents = self._documents(kwargs.get("position_ids"), mask, cache)
        return args, kwargs

    def _cache(self, kwargs: dict[str, Any]) -> HybridCache | None:
        names = ("cache", "past_key_values")
        # compared with None, because an empty cache is false
        given = next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
        if given is None:
            wanted = kwargs.get("use_cache")
            if wanted is None:
                wanted = getattr(self.config, "use_cache", True)
            if not wanted:
                return None
            given = kwargs[self.cache_name] = HybridCache(self.config, self.context.mamba_layers)
        held, own = getattr(given, "mamba_layers", None), self.context.mamba_layers
        if held != own:
            belongs = "a model without Mamba layers" if held is None else f"layers {list(held)}"
            raise ValueError(
                f"the cache belongs to {belongs}, this student has Mamba layers {list(own)}: "
                "start without a cache, or with the student's own"
            )
        return given

    @staticmethod
    def _real(mask: Any, length: int) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError("a student with Mamba layers needs an attention mask of shape [B, T]")
        return mask[:, -length:].bool()

    @staticmethod
    def _documents(positions: Any, mask: Any, cache: Any) -> Tensor | None:
        """Document indices of packed rows, [B, T]. As in padding-free batches of transformers,
        packed rows have no mask, and their position ids restart with each document. With M-RoPE,
        plain position ids come before those of the three axes."""
        if positions is None or mask is not None or cache is not None:
            return None
        if positions.ndim == 3 and len(positions) == 4:
            positions = positions[0]
        return (positions == 0).cumsum(-1) if positions.ndim == 2 else None  # [B, T]
