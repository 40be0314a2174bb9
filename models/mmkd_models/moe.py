"""Experts that stand in a feed-forward network's place and start as copies of it.

    p_t = softmax(W_r x_t)
    y_t = sum_{e in top-k} g_te FFN_e(x_t)    with g_te = p_te / (sum of the top-k's p)

Gates that sum to 1 make equal experts one expert: right after upcycling (Komatsuzaki et al. 2022,
arXiv 2212.05055) the layer is the network that it was copied from.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import expert_ffn, route
from .layout import MoeLayout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FORMS = (PROJECTIONS, ("w1", "w3", "w2"))
"""What families call gate, up and down projection; with the latter names the gate is SiLU."""


class Router(nn.Module):
    """Scores of the experts, in float32 whatever the student's precision.

    Args:
        hidden: width of a token.
        layout: how many experts there are.
        device: of the weight.
    """

    def __init__(self, hidden: int, layout: MoeLayout, device: torch.device):
        super().__init__()
        self.top_k = layout.top_k
        self.weight = nn.Parameter(
            torch.empty(layout.experts, hidden, dtype=torch.float32, device=device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> logits [..., E], float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """The experts' weights, stacked: gate and up [E, F, H], down [E, H, F], and the biases that
    the copied network has, [E, F] and [E, H]."""

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
        """Make every expert the given network."""
        for name, tensor in _tensors(mlp).items():
            if tensor is not None:
                getattr(self, name).copy_(tensor.expand_as(getattr(self, name)))


def _tensors(mlp: nn.Module) -> dict[str, Tensor | None]:
    """Weights and biases of a gated network, under the experts' names."""
    found: dict[str, Tensor | None] = {}
    for name, own in zip(PROJECTIONS, _form(mlp), strict=True):
        linear: nn.Linear = getattr(mlp, own)
        found[name], found[f"{name}_bias"] = linear.weight, linear.bias
    return found


class SparseFfn(nn.Module):
    """Takes a gated feed-forward network's place: same call, same return.

    Args:
        mlp: what it replaces: gives sizes, biases, dtype and activation.
        layout: how many experts, and how many a token meets.

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
        """Normal weights with the given standard deviation, no biases."""
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
    """Raise ValueError with the reason if `mlp` is not a gated network of three linear maps."""
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
