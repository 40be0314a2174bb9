"""The SSD scan in plain torch, by chunks. The backward pass recomputes each chunk.

This is the block decomposition of Dao & Gu 2024 (arXiv 2405.21060, section 6). For a chunk of T
tokens with initial state S, with u_t = dt_t x_t and a_t = sum_{r <= t} dt_r A:

    W_ts = exp(a_t - a_s) C_t . B_s  for s <= t
    y    = W u + exp(a) * (C S^T)
    S'   = exp(a_T) S + (exp(a_T - a) * u)^T B

Only the state at the start of each block of chunks is saved for the backward pass. Everything else
is computed again, so that the tensors of a block fit the cache of one core.

Shapes: x [B, L, S, P] with S state heads; R query heads per state head (R = 1 unless query heads
    share
states); b rows of the batch and K chunks of T tokens per block.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_spans import Span, plan_spans

FORGET = -1.0e3  # log-decay at a document's first token: its exp is 0, and sums stay finite


@dataclass
class _Inputs:
    """The inputs of the scan. The number of groups of C is a multiple of that of B."""

    x: Tensor  # [B, L, S, P]
    dt: Tensor  # [B, L, S]
    A: Tensor  # [S]
    B: Tensor  # [B, L, G, N]
    C: Tensor  # [B, L, G', N]
    D: Tensor | None  # [S R]
    starts: Tensor | None  # [B, L] bool, True at the first token of every document but the first
    wide: torch.dtype

    @property
    def heads(self) -> int:
        return max(self.x.shape[2], self.C.shape[2])


class _Local:
    """Tensors of a span that do not depend on its state: decays, scores and inputs, in `wide`."""

    def __init__(self, inputs: _Inputs, span: Span) -> None:
        self.inputs, self.span = inputs, span
        self.states = S = inputs.x.shape[2]
        wide, T, K = inputs.wide, span.size, span.chunks
        self.batch = span.rows.stop - span.rows.start
        self.shared = inputs.heads // S  # R
        # Number of groups of C for the state heads, and number of state heads per group.
        self.c_groups = min(inputs.C.shape[2], S)
        self.per_group = S // self.c_groups
        self.dt = span.cut(inputs.dt)  # [b, K, S, T]
        # In float32, sums of hundreds of log-decays are too imprecise for their small differences.
        log_decay = self.dt.double() * inputs.A.double()[:, None]
        if inputs.starts is not None:
            at_start = inputs.starts[span.rows, span.tokens].reshape(self.batch, K, 1, T)
            log_decay = log_decay + FORGET * at_start
        total = log_decay.cumsum(-1)  # [b, K, S, T]
        self.from_start = total.exp().to(wide)
        self.to_end = (total[..., -1:] - total).exp_().to(wide)
        self.whole = self.from_start[..., -1]  # [b, K, S]
        decay = (total[..., :, None] - total[..., None, :]).to(wide)
        # Above the diagonal exp may overflow. tril_ overwrites it; a product with 0 would give NaN.
        self.decay = decay.exp_().tril_()  # [b, K, S, T, T]
        x = span.cut(inputs.x)
        self.u = torch.empty(x.shape, dtype=wide, device=x.device)
        torch.mul(x, self.dt[..., None], out=self.u)  # [b, K, S, T, P]
        self.late = self.u * self.to_end[..., None]  # decayed to the end of the chunk
        self.B = span.copy(inputs.B, wide)  # [b, K, G, T, N]
        self.C = span.copy(inputs.C, wide)  # [b, K, G', T, N]
        folded = self.folded(self.C)
        self.scores = folded @ self.B.transpose(-1, -2)  # [b, K, G, (G'/G) T, T]
        self.weights = (self.by_group(self.scores) * self.by_head(self.decay)).view(
            self.batch, K, S, self.shared * T, T
        )

    def folded(self, t: Tensor) -> Tensor:
        """[b, K, G', T, X] as [b, K, G, (G'/G) T, X], so that one product covers all groups of C
        that share a group of B."""
        return t.view(*t.shape[:2], self.B.shape[2], -1, t.shape[-1])

    def by_group(self, t: Tensor) -> Tensor:
        """[b, K, (groups of C) R T, X] as [b, K, groups, 1, R, T, X]."""
        T, K = self.span.size, self.span.chunks
        return t.view(self.batch, K, self.c_groups, 1, self.shared, T, t.shape[-1])

    def by_head(self, t: Tensor) -> Tensor:
        """[b, K, S, T, X] as [b, K, groups, S / groups, 1, T, X]."""
        T, K = self.span.size, self.span.chunks
        return t.view(self.batch, K, self.c_groups, self.per_group, 1, T, t.shape[-1])

    def head_rows(self, t: Tensor) -> Tensor:
        """[b, K, S, R T, X] as [b, K, groups, S / groups, R, T, X]."""
        T, K = self.span.size, self.span.chunks
        return t.view(self.batch, K, self.c_groups, self.per_group, self.shared, T, t.shape[-1])

    def c_rows(self) -> Tensor:
        """C for the state heads, [b, K, groups, 1, R T, N]."""
        return self.C.view(self.batch, self.span.chunks, self.c_groups, 1, -1, self.C.shape[-1])

    def per_c_group(self, t: Tensor) -> Tensor:
        """[b, K, S, X, Y] as [b, K, groups of C, S / groups, X, Y]."""
        return t.unflatten(2, (self.c_groups, self.per_group))

    def per_b_group(self, t: Tensor) -> Tensor:
        """[b, K, S, X, Y] as [b, K, G, S / G, X, Y]."""
        return t.unflatten(2, (self.B.shape[2], -1))

    def row_decay(self) -> Tensor:
        """exp(a) for the rows of each query head, [b, K, S, R T, 1]."""
        decay = self.from_start
        if self.shared > 1:
            decay = decay.repeat(1, 1, 1, self.shared)
        return decay[..., None]

    def states_before(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each chunk [b, K, S, P, N] and after the last [b, S, P, N]."""
        added = self.per_b_group(self.late.transpose(-1, -2)) @ self.B[:, :, :, None]
        added = added.flatten(2, 3)  # [b, K, S, P, N]
        states = added.new_empty(self.batch, self.span.chunks + 1, *state.shape[1:])
        states[:, 0] = state
        for k in range(self.span.chunks):
            decay = self.whole[:, k, :, None, None]
            torch.addcmul(added[:, k], states[:, k], decay, out=states[:, k + 1])
        return states[:, :-1], states[:, -1]

    def output(self, before: Tensor) -> Tensor:
        """W u + exp(a) (C S^T) + D x, [b, K, S, R T, P]."""
        old = self.c_rows() @ self.per_c_group(before).transpose(-1, -2)
        old = old.view(*self.weights.shape[:-1], -1).mul_(self.row_decay())
        y = torch.baddbmm(old.flatten(0, 2), self.weights.flatten(0, 2), self.u.flatten(0, 2))
        y = y.view_as(old)
        if self.inputs.D is not None:
            self.head_values(y).addcmul_(self.x_rows(), self.skip_rows())
        return y

    def head_values(self, t: Tensor) -> Tensor:
        """[b, K, S, R T, P] as [b, K, S, R, T, P]."""
        return t.unflatten(3, (self.shared, self.span.size))

    def x_rows(self) -> Tensor:
        """x, broadcastable to the rows of each query head, [b, K, S, 1, T, P]."""
        return self.span.cut(self.inputs.x).unsqueeze(3).to(self.inputs.wide)

    def skip_rows(self) -> Tensor:
        assert self.inputs.D is not None
        return self.inputs.D.to(self.inputs.wide).view(self.states, self.shared, 1, 1)


@dataclass
class _Grads:
    """Gradients of the inputs, which the backward pass fills in span by span."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None

    @classmethod
    def empty(cls, inputs: _Inputs) -> "_Grads":
        D = inputs.D
        return cls(
            torch.empty_like(inputs.x, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.dt, memory_format=torch.contiguous_format),
            torch.zeros_like(inputs.A, dtype=torch.float64),
            torch.empty_like(inputs.B, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.C, memory_format=torch.contiguous_format),
            None if D is None else torch.zeros_like(D, dtype=torch.float64),
        )


def _states_backward(local: _Local, incoming: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the state after each chunk [b, K, S, P, N] and before the first [b, S, P, N].

    Args:
        local: tensors of the span.
        incoming: [b, K, S, P, N], gradient of the state before each chunk from the chunk's output.
        grad: [b, S, P, N], gradient of the state after the last chunk.
    """
    chunks = local.span.chunks
    after = incoming.new_empty(local.batch, chunks + 1, *grad.shape[1:])
    after[:, chunks] = grad
    for k in reversed(range(chunks)):
        decay = local.whole[:, k, :, None, None]
        torch.addcmul(incoming[:, k], after[:, k + 1], decay, out=after[:, k])
    return after[:, 1:], after[:, 0]


def _scores_backward(local: _Local, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the scores, [b, K, G, (G'/G) T, T], and of a_t through them, [b, K, S, T]."""
    grad = local.head_rows(dy @ local.u.transpose(-1, -2))
    grad.mul_(local.by_head(local.decay))  # [b, K, groups, S / groups, R, T, T]
    through = grad * local.by_group(local.scores)
    # exp(a_t - a_t) is 1 for any A. Including it would cost precision if the decay is strong.
    through.diagonal(dim1=-2, dim2=-1).zero_()
    row, column = through.sum(-1).sum(4), through.sum((4, 5))  # [b, K, groups, S / groups, T]
    d_total = (row - column).flatten(2, 3).double()
    grad = grad.sum(3) if local.per_group > 1 else grad
    return grad.reshape(local.scores.shape), d_total


def _c_backward(
    local: _Local, early: Tensor, before: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of C, [b, K, G', T, N], and of a_t through exp(a_t), [b, K, S, T]."""
    old = local.per_c_group(early) @ local.per_c_group(before)  # [b, K, groups, S/groups, R T, N]
    reached = (old * local.c_rows()).sum(-1).flatten(2, 3)  # [b, K, S, R T]
    reached = reached.unflatten(3, (local.shared, -1)).sum(3)
    old = old.sum(3) if local.per_group > 1 else old
    return _plus(old.reshape(local.C.shape), d_scores, local.B), reached


def _b_backward(local: _Local, after: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of B, [b, K, G, T, N], and of a_T - a_s through its exp, [b, K, S, T]."""
    new = local.per_b_group(local.late) @ local.per_b_group(after)  # [b, K, G, S / G, T, N]
    kept = (new * local.B[:, :, :, None]).sum(-1).flatten(2, 3).double()
    new = new.sum(3) if new.shape[3] > 1 else new.squeeze(3)
    return _plus(new, d_scores.transpose(-1, -2), local.folded(local.C)), kept


def _plus(added: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """added + left @ right, with the batch axes of the product summed to those of `left`."""
    shape = (*left.shape[:-1], right.shape[-1])
    product = torch.baddbmm(
        added.reshape(shape).flatten(0, 2), left.flatten(0, 2), right.flatten(0, 2)
    )
    return product.view(added.shape)


def _u_backward(local: _Local, after: Tensor, dy: Tensor) -> Tensor:
    """Gradient of u, [b, K, S, T, P]."""
    du = local.B[:, :, :, None] @ local.per_b_group(after).transpose(-1, -2)
    du = du.flatten(2, 3).mul_(local.to_end[..., None])
    return _plus(du, local.weights.transpose(-1, -2), dy)


def _backward_span(
    local: _Local, before: Tensor, grad_y: Tensor, grad_state: Tensor, grads: _Grads
) -> Tensor:
    """Add the gradients of one span, and return the gradient of the state before it."""
    inputs, span = local.inputs, local.span
    dy = span.copy_heads(grad_y, local.states, inputs.wide)  # [b, K, S, R T, P]
    early = dy * local.row_decay()  # [b, K, S, R T, P]
    incoming = local.per_c_group(early).transpose(-1, -2) @ local.c_rows()
    after, grad_state = _states_backward(local, incoming.flatten(2, 3), grad_state)
    d_scores, d_total = _scores_backward(local, dy)
    dC, reached = _c_backward(local, early, before, d_scores)
    dB, kept = _b_backward(local, after, d_scores)
    du = _u_backward(local, after, dy)
    span.write(grads.C, dC)
    span.write(grads.B, dB)

    # Gradient of log-decays: a_t sums those up to t, a_T - a_s those after s, and a_T all of them.
    d_log = (d_total + reached).flip(-1).cumsum(-1).flip(-1)  # [b, K, S, T]
    d_log[..., 1:] += kept[..., :-1].cumsum(-1)
    d_log += (local.whole * (before * after).sum((-1, -2)))[..., None]
    d_dt = d_log * inputs.A.double()[:, None] + (du * span.cut(inputs.x)).sum(-1)
    span.write(grads.dt, d_dt)
    grads.A += (d_log * local.dt).sum((0, 1, 3))

    dx = du.mul_(local.dt[..., None])
    if inputs.D is not None and grads.D is not None:
        heads, skip = local.head_values(dy), local.skip_rows()
        grads.D += (heads * local.x_rows()).sum((0, 1, 4, 5)).flatten()
        for r in range(local.shared):
            dx.addcmul_(heads[:, :, :, r], skip[:, r])
    span.write(grads.x, dx)
    return grad_state


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor | None,
        starts: Tensor | None,
        chunk_size: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs = _Inputs(x, dt, A, B, C, D, starts, wide)
        batch, length, states, width = x.shape
        y = x.new_empty(batch, length, inputs.heads, width)
        final = x.new_empty(batch, states, width, B.shape[-1], dtype=wide)
        if state is None:
            final.zero_()
        else:
            final.copy_(state)
        plan = plan_spans(batch, length, inputs.heads, chunk_size, x.device)
        kept = []
        for spans in plan:
            for span in spans:
                local = _Local(inputs, span)
                if keep:
                    kept.append(final[span.rows].clone())
                before, after = local.states_before(final[span.rows])
                span.write(y, local.output(before))
                final[span.rows] = after
        ctx.save_for_backward(x, dt, A, B, C, D, starts, *kept)
        ctx.plan, ctx.state_dtype = plan, None if state is None else state.dtype
        return y, final

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple:
        grad_y, grad_final = grad_output
        x, dt, A, B, C, D, starts, *kept = ctx.saved_tensors
        inputs = _Inputs(x, dt, A, B, C, D, starts, grad_final.dtype)
        grads = _Grads.empty(inputs)
        grad_state = grad_final.clone(memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):
            for spans in reversed(ctx.plan):
                for span in reversed(spans):
                    local = _Local(inputs, span)
                    before, _ = local.states_before(kept.pop())
                    grad_state[span.rows] = _backward_span(
                        local, before, grad_y, grad_state[span.rows], grads
                    )
        d_state = None if ctx.state_dtype is None else grad_state.to(ctx.state_dtype)
        d_D = None if grads.D is None or D is None else grads.D.to(D.dtype)
        d_A = grads.A.to(A.dtype)
        return grads.x, grads.dt, d_A, grads.B, grads.C, d_D, d_state, *[None] * 3


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    runs: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` on checked tensors; `runs` [B, L] are document indices from 0."""
    starts = None if runs is None else F.pad(runs.diff(dim=1) > 0, (1, 0))
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    groups = C.shape[2]
    if groups % B.shape[2]:
        C = C.repeat_interleave(math.lcm(groups, B.shape[2]) // groups, dim=2)
    floating = (x, dt, A, B, C, D, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floating)
    with torch.autocast(x.device.type, enabled=False):
        y, final = _ChunkedScan.apply(*floating, starts, chunk_size, keep)
    return y, final
