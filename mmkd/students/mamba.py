"""Seeding: what a Mamba-2 mixer starts from when it takes an attention's place.

default   nothing of the attention but its q/k norms: Mamba-2's own initialisation
inherit   v -> x, k -> B, q -> C, o -> out (MambaInLlama, arXiv 2408.15237; MaTVLM,
          arXiv 2503.13440); convolution, dt, A, D and gate as default
mimic     inherit, and the new parts pass on what they get: identity convolution, a dt that does
          not depend on the input, A = -e (mmMamba's seeding, arXiv 2502.13145); beyond mmMamba no
          skip (D = 0) and a gate that starts open
exact     inherit, and dt = 1, no decay, nothing in the way: unnormalised linear attention
"""

import math
from typing import Any

import torch
from torch import nn

from mmkd.recipe import MambaConversion, MambaInit
from mmkd_models.layout import MambaLayout
from mmkd_models.mixer import INHERITED, Mamba2Mixer

# What an init wants of the mixer's form, where the recipe leaves it open.
FORMS: dict[MambaInit, dict[str, Any]] = {
    "default": {"d_conv": 4, "activation": "silu", "norm": "head_rms", "norm_before_gate": False},
    "inherit": {"d_conv": 4, "activation": "silu", "norm": "head_rms", "norm_before_gate": False},
    "mimic": {"d_conv": 2, "activation": "silu", "norm": "head_rms", "norm_before_gate": True},
    "exact": {"d_conv": 4, "activation": "none", "norm": "none", "norm_before_gate": True},
}
DT_ONE = math.log(math.e - 1)  # softplus(DT_ONE) = 1
GATE_OPEN = 1.2784645427610738  # silu(GATE_OPEN) = 1
NO_DECAY = -30.0  # exp(-exp(NO_DECAY)) rounds to 1 in float32
MIMIC_A_LOG = 1.0
MIMIC_GATE_GAIN = 2.0**-2.5


def layout_of(conversion: MambaConversion, layers: list[int]) -> MambaLayout:
    """The mixers' form: what the recipe says, else what the init wants.

    Raises:
        ValueError: a value is unknown.
    """
    form = dict(FORMS[conversion.init])
    for name in MambaLayout.__dataclass_fields__:
        value = getattr(conversion, name, None)
        if name != "layers" and value is not None:
            form[name] = value
    return MambaLayout(layers=tuple(layers), **form)


@torch.no_grad()
def seed(mixer: Mamba2Mixer, attention: nn.Module, init: MambaInit) -> list[str]:
    """Set the mixer's weights, which have their default initialisation, from the attention's.

    Returns:
        The names of the parameters that were inherited.
    """
    if init == "default":
        return []
    _inherit(mixer, attention)
    if init in ("mimic", "exact"):
        mixer.conv_weight.zero_()
        mixer.conv_weight[:, -1] = 1.0
        mixer.conv_bias.zero_()
        mixer.dt_proj.weight.zero_()
        mixer.D.zero_()
        if mixer.layout.gate == "silu":
            mixer.gate_proj.bias.fill_(GATE_OPEN)
    if init == "mimic":
        mixer.A_log.fill_(MIMIC_A_LOG)
        if mixer.layout.gate == "silu":
            nn.init.xavier_uniform_(mixer.gate_proj.weight, gain=MIMIC_GATE_GAIN)
    if init == "exact":
        mixer.dt_bias.fill_(DT_ONE)
        mixer.A_log.fill_(NO_DECAY)
        if mixer.layout.gate == "silu":
            mixer.gate_proj.weight.zero_()
    return [n for n, _ in mixer.named_parameters() if n.split(".")[0] in INHERITED]


def _inherit(mixer: Mamba2Mixer, attention: Any) -> None:
    shape = mixer.shape
    _copy_heads(mixer.q_proj, attention.q_proj, shape.heads)
    _copy_heads(mixer.k_proj, attention.k_proj, shape.kv_heads)
    if mixer.d_state > shape.head_dim:
        # Zero keys in the new state columns add nothing; random queries let them learn.
        keys = mixer.k_proj.weight.unflatten(0, (shape.kv_heads, mixer.d_state))
        keys[:, shape.head_dim :] = 0
    for name in ("v_proj", "o_proj"):
        getattr(mixer, name).load_state_dict(getattr(attention, name).state_dict())


def _copy_heads(new: nn.Linear, old: nn.Linear, heads: int) -> None:
    """Copy each head's rows; a wider head keeps its further rows."""
    size = old.out_features // heads
    new.weight.unflatten(0, (heads, -1))[:, :size] = old.weight.unflatten(0, (heads, -1))
    if old.bias is not None:
        new.bias.unflatten(0, (heads, -1))[:, :size] = old.bias.unflatten(0, (heads, -1))
