"""`mamba`: attention becomes a Mamba-2 mixer, which starts from it (seeding).

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
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import Conversion, MambaConfig, MambaInit
from mmkd.students.layer_choice import converted_layers
from mmkd_models.layout import MambaLayout, mamba_layers
from mmkd_models.mixer import INHERITED, Mamba2Mixer
from mmkd_models.modeling_mmkd import become_student
from mmkd_models.parts import find_parts
from mmkd_models.surgery import replace_attention

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


class MambaConversion(Conversion):
    config_class = MambaConfig
    config: MambaConfig

    def check(self, model: PreTrainedModel) -> None:
        """
        Raises:
            RecipeError: the layers are not there, or are Mamba already.
        """
        chosen = self._chosen(model)
        if not set(chosen) - set(mamba_layers(model.config)):
            raise RecipeError(
                f"layers {chosen} are Mamba already",
                where=self.where,
                hint="name layers that have attention",
            )

    def convert(self, model: PreTrainedModel) -> list[str]:
        """
        Raises:
            ValueError: the attention of a layer cannot be converted.
        """
        layers, chosen = find_parts(model).decoder_layers, self._chosen(model)
        if self.config.layers is not None:
            chosen = sorted({*chosen, *mamba_layers(model.config)})
        layout = layout_of(self.config, chosen)
        inherited: list[str] = []
        for index, attention in replace_attention(model, layout).items():
            mixer: Any = layers[index].self_attn
            inherited = seed(mixer, attention, self.config.init)
        become_student(model, {"mamba": layout.to_dict()})
        return _described(mixer, inherited, chosen, len(layers), self.config.init)

    def _chosen(self, model: PreTrainedModel) -> list[int]:
        count, config = len(find_parts(model).decoder_layers), self.config
        return converted_layers(config.keep_attention, config.layers, count, where=self.where)


def _described(
    mixer: Mamba2Mixer, inherited: list[str], chosen: list[int], count: int, init: str
) -> list[str]:
    kept = [i for i in range(count) if i not in chosen]

    def listed(names: list[str]) -> str:
        sizes = dict(mixer.named_parameters())
        total = sum(sizes[n].numel() for n in names)
        return f"{', '.join(names) or 'nothing'} ({total:,} weights a layer)"

    new = [n for n, _ in mixer.named_parameters() if n not in inherited]
    return [
        f"decoder: Mamba-2 mixers ({init}) in layers {chosen}, attention in {kept or 'none'}",
        f"  inherited: {listed(inherited)}",
        f"  new: {listed(new)}",
    ]


def layout_of(conversion: MambaConfig, layers: list[int]) -> MambaLayout:
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
