"""A Mamba-2 mixer that replaces an attention module and can be initialised from it.

For each head, with projections q, k, v, z of the input u (Dao & Gu 2024, arXiv 2405.21060; the
correspondence C = q, B = k, x = v is from Wang et al. 2024, arXiv 2408.15237):

    [C, B, x] = act(conv([q, k, v]))          then q/k norm and RoPE as in the attention
    dt        = softplus(W_dt u + b_dt)
    S_t       = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
    y_t       = S_t C_t / sqrt(d) + D x_t
    out       = W_o (norm(y * silu(z)))       or  W_o (norm(y) * silu(z))

With dt = 1, A = 0, D = 0, an identity convolution and without activation, gate and norm, this is
unnormalised linear attention with the attention's projections.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import HybridCache, MambaLayer
from .layout import MambaLayout
from .scan import causal_conv, causal_conv_step, ssd_matrix, ssd_scan, ssd_step

QKV = ("q_proj", "k_proj", "v_proj")
PROJECTIONS = (*QKV, "o_proj")
QK_NORMS = ("q_norm", "k_norm")
INHERITED = (*PROJECTIONS, *QK_NORMS)
# Ranges of the initial dt and -A (arXiv 2405.21060, and its reference implementation).
DT_RANGE = (1e-3, 1e-1)
A_RANGE = (1.0, 16.0)
NORM_EPS = 1e-5


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention: `heads` queries and `kv_heads` keys of `head_dim`, values of
    `value_dim`; queries are multiplied by `scaling`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float

    @classmethod
    def of(cls, attention: nn.Module) -> "AttentionShape":
        """The sizes of an attention module.

        Raises:
            ValueError: a Mamba mixer cannot replace the attention.
        """
        refuse_unfaithful(attention)
        module: Any = attention
        kv_heads = module.k_proj.out_features // module.head_dim
        return cls(
            hidden=module.q_proj.in_features,
            heads=module.q_proj.out_features // module.head_dim,
            kv_heads=kv_heads,
            head_dim=module.head_dim,
            value_dim=module.v_proj.out_features // kv_heads,
            scaling=float(module.scaling),
        )


def refuse_unfaithful(attention: nn.Module) -> None:
    """Check that a Mamba mixer can replace an attention.

    Raises:
        ValueError: it cannot; with the reason.
    """
    lacking = [n for n in PROJECTIONS if not isinstance(getattr(attention, n, None), nn.Linear)]
    if lacking or not hasattr(attention, "head_dim"):
        raise ValueError(
            f"{type(attention).__name__} has no {', '.join(lacking) or 'head_dim'} to inherit"
        )
    unknown = {n for n, _ in attention.named_parameters()} - {
        f"{part}.{kind}" for part in INHERITED for kind in ("weight", "bias")
    }
    if unknown:
        raise ValueError(
            f"{type(attention).__name__} has parts that a Mamba mixer would drop: {min(unknown)}"
        )
    shape: Any = attention
    heads, kv_heads = (n.out_features // shape.head_dim for n in (shape.q_proj, shape.k_proj))
    if heads * (shape.v_proj.out_features // kv_heads) != shape.o_proj.in_features:
        raise ValueError(f"{type(attention).__name__} has a gate in its q_proj")
    if getattr(attention, "sliding_window", None) is not None:
        raise ValueError(
            "it is a sliding-window attention: its cost is bounded already, and a recurrent state "
            "cannot drop tokens at the window's edge"
        )
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        raise ValueError("it soft-caps its attention logits, which a Mamba mixer cannot do")
    if not getattr(attention, "is_causal", True):
        raise ValueError("its attention is bidirectional, and a Mamba mixer is causal")


class SequenceContext:
    """Masks of the current forward pass, shared by all mixers of a model.

    Decoder layers receive a 4-D attention mask or none, but mixers need to know which tokens are
    padding and where packed documents begin. `mmkd_models.surgery` sets the masks before each
    forward pass.
    """

    def __init__(self) -> None:
        self.real: Tensor | None = None  # [B, T] bool, False on padding; None: no padding
        self.documents: Tensor | None = None  # [B, T] int; None: one document per row
        self.mamba_layers: tuple[int, ...] = ()  # of the model, for its cache


class Mamba2Mixer(nn.Module):
    """A mixer with the same signature as the attention that it replaces.

    Args:
        attention: is replaced. Its sizes, biases, q/k norms and its family's RoPE are used.
        layout: settings of the mixer.
        layer_idx: index of the layer, for the cache.
        context: shared by all mixers of the model.

    Raises:
        ValueError: a mixer cannot replace the attention, or the layout does not fit it.
    """

    def __init__(
        self, attention: nn.Module, layout: MambaLayout, layer_idx: int, context: SequenceContext
    ):
        super().__init__()
        shape = AttentionShape.of(attention)
        self.shape, self.layout, self.layer_idx = shape, layout, layer_idx
        self._context = [context]  # in a list, so that copies of the module share it
        self.d_state = layout.d_state or shape.head_dim
        if self.d_state < shape.head_dim:
            raise ValueError(
                f"layout: d_state {self.d_state} is less than the head size {shape.head_dim}"
            )
        self.rotary = _rotary_of(attention) if layout.rope else None
        like: Any = attention
        weight: Tensor = like.q_proj.weight
        new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        queries, keys = shape.heads * self.d_state, shape.kv_heads * self.d_state
        values, out = shape.kv_heads * shape.value_dim, shape.heads * shape.value_dim
        self.q_proj = nn.Linear(shape.hidden, queries, like.q_proj.bias is not None, **new)
        self.k_proj = nn.Linear(shape.hidden, keys, like.k_proj.bias is not None, **new)
        self.v_proj = nn.Linear(shape.hidden, values, like.v_proj.bias is not None, **new)
        self.o_proj = nn.Linear(out, like.o_proj.out_features, like.o_proj.bias is not None, **new)
        for name in QK_NORMS:
            if getattr(attention, name, None) is not None:
                setattr(self, name, copy.deepcopy(getattr(attention, name)))
        self.conv_weight = nn.Parameter(torch.empty(queries + keys + values, layout.d_conv, **new))
        self.conv_bias = nn.Parameter(torch.empty(queries + keys + values, **new))
        states = shape.heads if layout.state == "query" else shape.kv_heads
        self.dt_proj = nn.Linear(shape.hidden, states, bias=False, **new)
        exact: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.dt_bias = nn.Parameter(torch.empty(states, **exact))
        self.A_log = nn.Parameter(torch.empty(states, **exact))
        self.D = nn.Parameter(torch.empty(shape.heads, **exact))
        if layout.gate == "silu":
            self.gate_proj = nn.Linear(shape.hidden, out, bias=True, **new)
        if layout.norm == "head_rms":
            self.norm_weight = nn.Parameter(torch.empty(shape.heads, shape.value_dim, **new))
        self.reset_parameters()

    @property
    def context(self) -> SequenceContext:
        return self._context[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's default initialisation (arXiv 2405.21060, reference implementation)."""
        for name in (*PROJECTIONS, "dt_proj", "gate_proj"):
            if hasattr(self, name):
                linear: nn.Linear = getattr(self, name)
                nn.init.normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        bound = 1 / math.sqrt(self.layout.d_conv)
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        low, high = (math.log(edge) for edge in DT_RANGE)
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(low, high))
        self.dt_bias.copy_(inverse_softplus(dt))
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*A_RANGE).log())
        nn.init.ones_(self.D)
        if self.layout.norm == "head_rms":
            nn.init.ones_(self.norm_weight)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: HybridCache | None = None,
        past_key_values: HybridCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens, [B, T, H] -> [B, T, H]. Padding and documents are read from the context
        instead of the attention mask."""
        held = past_key_values if cache is None else cache
        heads = self.mix(hidden_states, position_embeddings, held)
        return self.o_proj(heads), None

    def mix(
        self,
        u: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: HybridCache | None = None,
    ) -> Tensor:
        """The input of the output projection, [B, T, heads * value_dim]."""
        held: Any = None if cache is None else cache.layers[self.layer_idx]  # MambaLayer
        stepping = held is not None and held.tokens > 0 and u.shape[1] == 1
        projected = self._masked(self._project(u))  # [B, T, channels]
        if stepping:
            mixed, conv_state = causal_conv_step(
                projected[:, 0],
                held.conv_state,
                self.conv_weight,
                self.conv_bias,
                activation=self._activation,
            )
            mixed = mixed[:, None]
        else:
            mixed, conv_state = causal_conv(
                projected,
                self.conv_weight,
                self.conv_bias,
                activation=self._activation,
                initial_state=None if held is None else held.conv_state,
                documents=self.context.documents,
            )
        C, B, x = self._heads(mixed, position_embeddings)
        dt = self._dt(u)
        if stepping:
            y, state = self._step(x, dt, B, C, held)
        else:
            y, state = self._scan(x, dt, B, C, held)
        if held is not None:
            held.advance(self._last_inputs(projected, conv_state, held), state, u.shape[1])
        return self._gated(y, u)

    def matrix(self, u: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The mixing matrix M in y = M x + D x, [B, heads, T, T] (MOHAWK, arXiv 2408.10189,
        stage 1); quadratic in T."""
        mixed, _ = causal_conv(
            self._masked(self._project(u)),
            self.conv_weight,
            self.conv_bias,
            activation=self._activation,
            documents=self.context.documents,
        )
        C, B, _ = self._heads(mixed, position_embeddings)
        dt, A = self._per_query_head(self._dt(u)), self._per_query_head(self._decay)
        return ssd_matrix(dt, A, B, C)

    @property
    def _activation(self) -> str | None:
        return None if self.layout.activation == "none" else self.layout.activation

    @property
    def _decay(self) -> Tensor:
        """A, [states]."""
        return -torch.exp(self.A_log.float())

    def _project(self, u: Tensor) -> Tensor:
        return torch.cat([self.q_proj(u), self.k_proj(u), self.v_proj(u)], dim=-1)

    def _masked(self, projected: Tensor) -> Tensor:
        """Set padding to 0 after the projection, because biases make it nonzero."""
        real = self.context.real
        return projected if real is None else projected * real[..., None].to(projected.dtype)

    def _dt(self, u: Tensor) -> Tensor:
        """[B, T, states] float32, 0 on padding."""
        dt = F.softplus(self.dt_proj(u).float() + self.dt_bias.float())
        real = self.context.real
        return dt if real is None else dt * real[..., None]

    def _heads(
        self, mixed: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C [B, T, heads, N], B [B, T, kv_heads, N] and x [B, T, kv_heads, P]."""
        shape, N = self.shape, self.d_state
        sizes = [shape.heads * N, shape.kv_heads * N, shape.kv_heads * shape.value_dim]
        q, k, v = mixed.split(sizes, dim=-1)
        q, k = self.qk_normed(q, "q_norm"), self.qk_normed(k, "k_norm")
        if self.rotary is not None and position_embeddings is not None:
            q, k = self._rotated(q, k, position_embeddings)
        return q * shape.scaling, k, v.unflatten(-1, (shape.kv_heads, shape.value_dim))

    def qk_normed(self, flat: Tensor, name: str) -> Tensor:
        """[B, T, heads * N] to [B, T, heads, N], with the attention's own norm over the head or
        over all heads."""
        heads = flat.unflatten(-1, (-1, self.d_state))
        norm = getattr(self, name, None)
        if norm is None:
            return heads
        size = self.shape.head_dim
        inherited = heads[..., :size]
        shape = getattr(norm.weight, "ds_shape", norm.weight.shape)  # of the full weight, in ZeRO 3
        if shape.numel() == size:
            inherited = norm(inherited)
        else:
            inherited = norm(inherited.flatten(-2)).view_as(inherited)
        return torch.cat([inherited, heads[..., size:]], dim=-1).to(flat.dtype)

    def _rotated(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        size = self.shape.head_dim
        cos, sin = position_embeddings
        rotated = self.rotary(q[..., :size], k[..., :size], cos, sin, unsqueeze_dim=2)
        if self.d_state == size:
            return rotated
        q, k = (
            torch.cat([r, whole[..., size:]], -1) for r, whole in zip(rotated, (q, k), strict=True)
        )
        return q, k

    def _per_query_head(self, per_state: Tensor) -> Tensor:
        """Repeat values of key-value heads for each of their query heads, along the last axis."""
        return per_state.repeat_interleave(self.shape.heads // per_state.shape[-1], dim=-1)

    def _values(self, x: Tensor) -> Tensor:
        """x for each state. It is repeated if each query head has a state of its own."""
        if self.layout.state == "kv":
            return x
        return x.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=2)

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, held: MambaLayer | None
    ) -> tuple[Tensor, Tensor]:
        """y, [B, T, heads, P], and the states after the last token."""
        return ssd_scan(
            self._values(x),
            dt,
            self._decay,
            B,
            C,
            D=self.D,
            initial_state=None if held is None else held.ssm_state,
            documents=self.context.documents,
        )

    def _step(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, held: MambaLayer
    ) -> tuple[Tensor, Tensor]:
        assert held.ssm_state is not None
        x = self._values(x)[:, 0]
        y, state = ssd_step(x, dt[:, 0], self._decay, B[:, 0], C[:, 0], held.ssm_state, D=self.D)
        return y[:, None], state

    def _last_inputs(self, projected: Tensor, conv_state: Tensor, held: MambaLayer) -> Tensor:
        """The convolution's state after the last token of each row, [B, C, K - 1].

        The state that the convolution returns would contain padding in right-padded rows.
        """
        real, taps = self.context.real, self.layout.d_conv - 1
        if real is None or taps == 0:
            return conv_state
        before = held.conv_state
        if before is None:
            before = projected.new_zeros(projected.shape[0], projected.shape[2], taps)
        inputs = torch.cat([before, projected.transpose(1, 2)], dim=-1)  # [B, C, taps + T]
        position = torch.arange(1, real.shape[1] + 1, device=real.device)
        ends = (real * position).amax(1)  # [B], number of tokens up to the last one
        window = ends[:, None] + torch.arange(taps, device=real.device)  # [B, taps]
        return inputs.gather(2, window[:, None].expand(-1, inputs.shape[1], -1))

    def _gated(self, y: Tensor, u: Tensor) -> Tensor:
        gate: Tensor | None = None
        if self.layout.gate == "silu":
            gate = F.silu(self.gate_proj(u)).unflatten(-1, (self.shape.heads, self.shape.value_dim))
        if self.layout.norm_before_gate:
            y = self._normed(y)
            y = y if gate is None else y * gate
        else:
            y = self._normed(y if gate is None else y * gate)
        return y.flatten(-2).to(u.dtype)

    def _normed(self, y: Tensor) -> Tensor:
        if self.layout.norm == "none":
            return y
        normed = F.rms_norm(y.float(), (self.shape.value_dim,), eps=NORM_EPS)
        return (normed * self.norm_weight.float()).to(y.dtype)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y."""
    return y + torch.log(-torch.expm1(-y))


def _rotary_of(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The RoPE function of the attention's family; None if it has none."""
    if not getattr(attention, "use_rope", True):
        return None
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
