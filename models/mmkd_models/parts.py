"""Find the parts of a vision-language model of transformers, for any family."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .mixer import INHERITED, QKV, Mamba2Mixer
from .moe import SparseFfn

FEED_FORWARD = ("mlp", "feed_forward")  # names of the feed-forward network in decoder layers
FINAL_NORM = ("norm", "final_layernorm")  # names of the norm after the last decoder layer
CONNECTOR_IN_TOWER = ("merger",)  # the connector of Qwen-VL is a part of its vision tower


@dataclass(frozen=True)
class Parts:
    """The modules of one model.

    Attributes:
        decoder: the text decoder, without head.
        decoder_layers: its layers.
        vision: the vision tower, or None for a text model.
        vision_layers: its layers, or None.
        head: the output embedding; may share its weight with the input embedding.
        final_norm: the norm after the last decoder layer, or None.
    """

    decoder: nn.Module
    decoder_layers: nn.ModuleList
    vision: nn.Module | None
    vision_layers: nn.ModuleList | None
    head: nn.Module
    final_norm: nn.Module | None = None


def find_parts(model: PreTrainedModel) -> Parts:
    """Find the parts of a model.

    Raises:
        ValueError: it has no decoder layers or no output head.
    """
    decoder = model.get_decoder()
    vision = model.get_encoder(modality="image")
    vision = None if vision is model else vision
    head = model.get_output_embeddings()
    decoder_layers = _layers(decoder)
    if head is None or decoder_layers is None:
        raise ValueError(f"{type(model).__name__} has no decoder layers or no output head")
    norms = [getattr(decoder, name, None) for name in FINAL_NORM]
    final_norm = next((n for n in norms if isinstance(n, nn.Module)), None)
    return Parts(decoder, decoder_layers, vision, _layers(vision), head, final_norm)


def _layers(module: nn.Module | None) -> nn.ModuleList | None:
    """The outermost module list with at least one block that has attention."""
    if module is None:
        return None
    for _, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and any(map(_attends, child)):
            return child
    return None


def _attends(block: nn.Module) -> bool:
    return any(hasattr(block, name) for name in ("self_attn", "attn", "attention"))


def feed_forward(layer: nn.Module) -> tuple[str, nn.Module | None]:
    """The name and module of a decoder layer's feed-forward network; None if there is none."""
    for name in FEED_FORWARD:
        network = getattr(layer, name, None)
        if isinstance(network, nn.Module):
            return name, network
    return FEED_FORWARD[0], None


def parameter_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the parameters of each group. A parameter may belong to several groups.

    Groups of all models: `all`, `vision`, `connector`, `language_model` (decoder with embeddings),
    `embeddings`, `head`, and `ffn` (feed-forward networks and experts of all decoder layers,
    without routers). Groups of Mamba mixers: `mamba`, `mamba.new` (convolution, dt, A, D, gate,
    norm), `mamba.inherited` (parameters taken over from attention) and `mamba.qkv` (q, k and v
    projections). Groups of sparse students: `moe`, `moe.experts` and `moe.router`.
    """
    parts = find_parts(model)

    def ids(module: nn.Module | None) -> set[int]:
        return set() if module is None else {id(p) for p in module.parameters()}

    merger = set()
    if parts.vision is not None:
        merger = {
            id(p)
            for name, p in parts.vision.named_parameters()
            if any(word in name for word in CONNECTOR_IN_TOWER)
        }
    vision, decoder, head = ids(parts.vision) - merger, ids(parts.decoder), ids(parts.head)
    embeddings = ids(model.get_input_embeddings())
    named = list(model.named_parameters())
    known = {
        "vision": vision,
        "language_model": decoder | head,
        "embeddings": embeddings,
        "head": head,
        "connector": {id(p) for _, p in named} - vision - decoder - head,
        "all": {id(p) for _, p in named},
        **_mamba_groups(parts.decoder),
        **_ffn_groups(parts.decoder_layers),
    }
    return {group: [n for n, p in named if id(p) in members] for group, members in known.items()}


def _mamba_groups(decoder: nn.Module) -> dict[str, set[int]]:
    named = [
        (name.split(".")[0], id(p))
        for mixer in decoder.modules()
        if isinstance(mixer, Mamba2Mixer)
        for name, p in mixer.named_parameters()
    ]
    return {
        "mamba": {p for _, p in named},
        "mamba.new": {p for part, p in named if part not in INHERITED},
        "mamba.inherited": {p for part, p in named if part in INHERITED},
        "mamba.qkv": {p for part, p in named if part in QKV},
    }


def _ffn_groups(layers: nn.ModuleList) -> dict[str, set[int]]:
    networks = [n for layer in layers if (n := feed_forward(layer)[1]) is not None]
    sparse = [n for n in networks if isinstance(n, SparseFfn)]

    def ids(modules: list[nn.Module]) -> set[int]:
        return {id(p) for m in modules for p in m.parameters()}

    routers = ids([n.router for n in sparse])
    return {
        "ffn": ids(networks) - routers,
        "moe": ids([*sparse]),
        "moe.experts": ids([n.experts for n in sparse]),
        "moe.router": routers,
    }
