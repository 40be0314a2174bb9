"""Where a Hugging Face vision-language model keeps its parts, whatever its family."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .mixer import INHERITED, QKV, Mamba2Mixer
from .moe import SparseFfn

FEED_FORWARD = ("mlp", "feed_forward")  # what decoder layers call their feed-forward network
CONNECTOR_IN_TOWER = ("merger",)  # Qwen-VL keeps its connector inside of the vision tower


@dataclass(frozen=True)
class Parts:
    """The modules of one model.

    Attributes:
        decoder: the text decoder, without head.
        decoder_layers: its layers.
        vision: the vision tower, or None for a text model.
        vision_layers: its layers, or None.
        head: the output embedding; may share its weight with the input embedding.
    """

    decoder: nn.Module
    decoder_layers: nn.ModuleList
    vision: nn.Module | None
    vision_layers: nn.ModuleList | None
    head: nn.Module


def find_parts(model: PreTrainedModel) -> Parts:
    """Find the parts of `model`.

    Raises:
        ValueError: a part that every vision-language model has cannot be found.
    """
    decoder = model.get_decoder()
    vision = model.get_encoder(modality="image")
    vision = None if vision is model else vision
    head = model.get_output_embeddings()
    decoder_layers = _layers(decoder)
    if head is None or decoder_layers is None:
        raise ValueError(f"{type(model).__name__} has no decoder layers or no output head")
    return Parts(decoder, decoder_layers, vision, _layers(vision), head)


def _layers(module: nn.Module | None) -> nn.ModuleList | None:
    """The outermost list of blocks of which one at least has attention."""
    if module is None:
        return None
    for _, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and any(map(_attends, child)):
            return child
    return None


def _attends(block: nn.Module) -> bool:
    return any(hasattr(block, name) for name in ("self_attn", "attn", "attention"))


def feed_forward(layer: nn.Module) -> tuple[str, nn.Module | None]:
    """A decoder layer's feed-forward network and its name there; None if it has none."""
    for name in FEED_FORWARD:
        network = getattr(layer, name, None)
        if isinstance(network, nn.Module):
            return name, network
    return FEED_FORWARD[0], None


def parameter_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the parameters of each trainable group; a parameter may be in several.

    Groups: `vision`, `connector`, `language_model` (decoder with embeddings), `embeddings`, `head`,
    `all`; of a student's Mamba mixers `mamba`, `mamba.new` (convolution, dt, A, D, gate, norm),
    `mamba.inherited` (what attention had too) and `mamba.qkv` (its q, k and v projections); `ffn`
    (feed-forward networks of all decoder layers, dense ones and experts, without routers), and of a
    sparse student `moe`, `moe.experts` and `moe.router`.
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
