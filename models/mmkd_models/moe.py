"""Experts that replace a feed-forward network and are initialised as copies of it.

    p_t = softmax(W_r x_t)
    y_t = sum_{e in top-k} g_te FFN_e(x_t)    with g_te = p_te / (sum of the top-k's p)

Because gates sum to 1, equal experts act like one expert: directly after upcycling (Komatsuzaki et
al. 2022, arXiv 2212.05055), the layer computes the same function as the original network.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import expert_ffn, route
from .layout import MoeLayout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FORMS = (PROJECTIONS, ("w1", "w3", "w2"))
"""Names of gate, up and down projection. With the second set of names, the activation is SiLU."""


class Router(nn.Module):
    """The router, a linear layer in float32, independent of the student's dtype.

    Args:
        hidden: width of the hidden states.
        layout: settings of the experts.
        device: of the weight.
    """

    def __init__(self, hidden: int, layout: MoeLayout, device: torch.device):
        super().__init__()
        self.top_k = layout.top_k
        self.weight = nn.Parameter(
            torch.empty(layout.experts, hidden, dtype=torch.float32, device=device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Router logits: [..., H] -> [..., E], float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """Stacked weights of the experts: gate and up [E, F, H], down [E, H, F], and biases [E, F] and
    [E, H] if the original network has them."""

    def __init__(self, mlp: nn.Module, layout: MoeLayout):
        super().__init__()
        for name, tensor in _tensors(mlp).items():
            made = None
            if tensor is not None:
                shape = (layout.experts, *tensor.shape)
                made = nn.Parameter(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
            self.register_parameter(name, made)

    @torch.no_grad()
    def copy_of(self, mlp: nn.Module) -> None:
        """Copy the weights of a network into every expert."""
        for name, tensor in _tensors(mlp).items():
            if tensor is not None:
                getattr(self, name).copy_(tensor.expand_as(getattr(self, name)))


def _tensors(mlp: nn.Module) -> dict[str, Tensor | None]:
    """Weights and biases of a gated network, by the names of `Experts`."""
    found: dict[str, Tensor | None] = {}
    for name, own in zip(PROJECTIONS, _form(mlp), strict=True):
        linear: nn.Linear = getattr(mlp, own)
        found[name], found[f"{name}_bias"] = linear.weight, linear.bias
    return found


class SparseFfn(nn.Module):
    """Experts with the same signature as the gated feed-forward network that they replace.

    Args:
        mlp: is replaced. Its sizes, biases, dtype and activation are used.
        layout: number of experts, and of experts per token.

    Raises:
        ValueError: the network cannot be replaced.
    """

    def __init__(self, mlp: nn.Module, layout: MoeLayout):
        super().__init__()
        refuse_other_ffn(mlp)
        weight: Any = _tensors(mlp)["up_proj"]
        self.layout = layout
        self.act_fn: Any = getattr(mlp, "act_fn", F.silu)
        self.router = Router(weight.shape[1], layout, weight.device)
        self.experts = Experts(mlp, layout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise weights from a normal distribution, and biases with 0."""
        nn.init.normal_(self.router.weight, std=std)
        for name, parameter in self.experts.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        logits = self.router(hidden_states)  # [B, T, E]
        experts: Any = self.experts
        y = expert_ffn(
            hidden_states.flatten(0, -2),
            route(logits.flatten(0, -2), self.layout.top_k),
            experts.up_proj,
            experts.down_proj,
            activation=self.act_fn,
            gate=experts.gate_proj,
            up_bias=experts.up_proj_bias,
            gate_bias=experts.gate_proj_bias,
            down_bias=experts.down_proj_bias,
        )
        return y.view_as(hidden_states)


def refuse_other_ffn(mlp: nn.Module) -> None:
    """Check that a network is a gated feed-forward network of three linear layers.

    Raises:
        ValueError: it is not; with the reason.
    """
    if isinstance(mlp, SparseFfn):
        raise ValueError("it has experts already")
    form = _form(mlp)
    lacking = [n for n in form if not isinstance(getattr(mlp, n, None), nn.Linear)]
    if lacking or (form == PROJECTIONS and not callable(getattr(mlp, "act_fn", None))):
        raise ValueError(f"{type(mlp).__name__} has no {', '.join(lacking) or 'act_fn'} to copy")
    known = {f"{part}.{kind}" for part in form for kind in ("weight", "bias")}
    if unknown := {n for n, _ in mlp.named_parameters()} - known:
        raise ValueError(f"{type(mlp).__name__} has parts that experts would drop: {min(unknown)}")


def _form(mlp: nn.Module) -> tuple[str, ...]:
    return next((form for form in FORMS if all(hasattr(mlp, n) for n in form)), PROJECTIONS)
