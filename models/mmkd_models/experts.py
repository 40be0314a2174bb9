"""Mixture of experts: routing of tokens, and the experts' feed-forward networks.

No token is dropped and routing is deterministic, in training and evaluation. Every token is
processed by exactly `top_k` experts, so the sum over experts is a sum over an axis, in the same
order on every device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "torch", "grouped")


@dataclass(frozen=True)
class Routing:
    """The experts of n tokens.

    Attributes:
        probabilities: [n, E], the router's softmax, in at least float32.
        experts: [n, k] int64, the chosen experts, by descending probability.
        gates: [n, k], their probabilities, normalised to a sum of 1.
    """

    probabilities: Tensor
    experts: Tensor
    gates: Tensor


def route(logits: Tensor, top_k: int) -> Routing:
    """Choose the `top_k` most probable experts of each token, with gates that sum to 1.

    If all experts are equal, as directly after sparse upcycling (LLaVA-MoD, arXiv 2408.15881;
    Komatsuzaki et al., arXiv 2212.05055), the output is therefore that of one expert.

    Args:
        logits: [n, E].
        top_k: number of experts per token, from 1 to E.

    Raises:
        ValueError: top_k is out of range.
    """
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"cannot choose {top_k} experts from logits {list(logits.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = wide.softmax(-1)
    chosen, experts = probabilities.topk(top_k, dim=-1)
    return Routing(probabilities, experts, chosen / chosen.sum(-1, keepdim=True))


def expert_ffn(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = sum_e g_te FFN_e(x_t) over the experts of each token.

    FFN(x) = W_down act(W_up x), or W_down (act(W_gate x) * W_up x) with a gate.

    Args:
        x: [n, H].
        routing: of the n tokens.
        up, gate: [E, F, H].
        down: [E, H', F].
        activation: an elementwise function.
        up_bias, gate_bias: [E, F] or None.
        down_bias: [E, H'] or None.
        backend: "auto" ("grouped" on CUDA in bfloat16, else "torch"), "torch" (one expert after
            the other) or "grouped" (one grouped matrix product for all experts).

    Returns:
        [n, H'] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    _check(x, routing, up, down, gate)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "grouped" if x.is_cuda and _product_dtype(x) is torch.bfloat16 else "torch"
    top_k = routing.experts.shape[1]
    order = routing.experts.flatten().argsort(stable=True)  # [n k], by expert
    counts = routing.experts.flatten().bincount(minlength=len(up))  # [E]
    # Not x[order // k]: on CUDA, the order of additions in its gradient is not deterministic.
    sent = x[:, None].expand(-1, top_k, -1).flatten(0, 1)[order]  # [n k, H]
    weights = (up, gate, down)
    biases = (up_bias, gate_bias, down_bias)
    ffn = _grouped if backend == "grouped" else _one_by_one
    made = ffn(sent, counts, weights, biases, activation)  # [n k, H']
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    made = made[back].unflatten(0, (-1, top_k))  # [n, k, H']
    gates = routing.gates.to(made.dtype)
    return (gates[:, None] @ made)[:, 0].to(x.dtype)


Three = tuple[Tensor, Tensor | None, Tensor]
Biases = tuple[Tensor | None, Tensor | None, Tensor | None]


def _one_by_one(
    sent: Tensor, counts: Tensor, weights: Three, biases: Biases, activation: Callable
) -> Tensor:
    """Run one expert after the other, so that its tokens stay in the CPU cache."""
    experts = len(counts)

    def each(stacked: Tensor | None) -> Sequence[Any]:
        # Not stacked[expert]: its gradient would have the size of all experts.
        return [None] * experts if stacked is None else stacked.unbind()

    up, gate, down = (each(w) for w in weights)
    up_bias, gate_bias, down_bias = (each(b) for b in biases)
    made = []
    for e, tokens in enumerate(sent.split(counts.tolist())):
        if len(tokens) == 0:
            continue
        upper = F.linear(tokens, up[e], up_bias[e])
        gating = None if gate[e] is None else F.linear(tokens, gate[e], gate_bias[e])
        made.append(F.linear(_activated(upper, gating, activation), down[e], down_bias[e]))
    return torch.cat(made) if made else sent.new_zeros(0, weights[2].shape[1])


def _grouped(
    sent: Tensor, counts: Tensor, weights: Three, biases: Biases, activation: Callable
) -> Tensor:
    """Run all experts in one grouped product, without waiting for the counts on the CPU."""
    dtype = _product_dtype(sent)
    ends = counts.cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(counts, output_size=len(sent))  # [n k]

    def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.grouped_mm(tokens.to(dtype), weight.to(dtype).transpose(-2, -1), offs=ends)
        return y if bias is None else y + bias[expert].to(dtype)

    up, gate, down = weights
    upper = linear(sent, up, biases[0])
    gating = None if gate is None else linear(sent, gate, biases[1])
    return linear(_activated(upper, gating, activation), down, biases[2])


def _activated(upper: Tensor, gating: Tensor | None, activation: Callable) -> Tensor:
    return activation(upper) if gating is None else activation(gating) * upper


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of x: autocast's, if it is enabled."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """E sum_e mean_t(p_te) share_t(e is first): 1 for balanced experts, E if all tokens have the
    same first expert.

    Fedus et al. 2021 (arXiv 2101.03961, equation 4), as in LLaVA-MoD.

    Args:
        routing: of n tokens.
        mask: [n] bool, the tokens that count; None for all.

    Returns:
        A scalar; 0 if no token counts.
    """
    probabilities, first = routing.probabilities, routing.experts[:, 0]
    if mask is not None:
        probabilities, first = probabilities[mask], first[mask]
    count = max(len(first), 1)
    experts = probabilities.shape[1]
    share = first.bincount(minlength=experts).to(probabilities.dtype) / count
    return experts * (probabilities.sum(0) / count * share).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean_t (log sum_e exp l_te)^2, which penalises large router logits (Zoph et al. 2022,
    arXiv 2202.08906, equation 5).

    Args:
        logits: [n, E].
        mask: [n] bool, the tokens that count; None for all.

    Returns:
        A scalar; 0 if no token counts.
    """
    if mask is not None:
        logits = logits[mask]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1).square().sum() / max(len(logits), 1)


def _check(x: Tensor, routing: Routing, up: Tensor, down: Tensor, gate: Tensor | None) -> None:
    if x.dim() != 2 or len(routing.experts) != len(x):
        raise ValueError(f"x must be [{len(routing.experts)}, H], got {list(x.shape)}")
    experts = routing.probabilities.shape[1]
    if up.dim() != 3 or up.shape[0] != experts or up.shape[2] != x.shape[1]:
        raise ValueError(f"up must be [{experts}, F, {x.shape[1]}], got {list(up.shape)}")
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"gate must be {list(up.shape)}, got {list(gate.shape)}")
    if down.dim() != 3 or down.shape[0] != experts or down.shape[2] != up.shape[1]:
        raise ValueError(f"down must be [{experts}, H, {up.shape[1]}], got {list(down.shape)}")
