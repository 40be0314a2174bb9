"""The Mamba-2 scan (state space duality) of sequences and of single tokens, and its mixing matrix.

For each head, with a state S [P, N] (Dao & Gu 2024, arXiv 2405.21060, sections 3 and 6):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
    y_t = S_t C_t + D x_t

Neighbouring heads share groups of B and C, like keys in grouped-query attention.
"""

import torch
from torch import Tensor

from .conv import causal_conv, causal_conv_step
from .documents import document_runs
from .kernels import kernel_scan, kernel_step, scan_unfit, step_unfit, use_kernel
from .scan_torch import chunked_scan

__all__ = ["causal_conv", "causal_conv_step", "ssd_matrix", "ssd_scan", "ssd_step"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan whole sequences. Differentiable (once) in all floating-point inputs.

    Decays, states and sums are computed in at least float32, under autocast too. A token with
    `dt = 0` does not change the state, so padding is skipped on either side.

    Args:
        x: [B, L, H, P], floating point, L >= 1.
        dt: [B, L, H], >= 0, after softplus.
        A: [H], negative.
        B: [B, L, G, N]; G divides H, head h reads group h // (H / G).
        C: [B, L, G', N]; G' divides H. Or G' = r H query heads, with r query heads per state, as in
            grouped-query attention; then y has r H heads and D is [r H].
        D: [H] or None.
        initial_state: [B, H, P, N]; None: zeros.
        documents: [B, L] integers, equal for all (consecutive) tokens of a packed document.
            Documents are isolated. The initial state belongs to the first document of a row.
        chunk_size: tokens per chunk of the torch path; it changes rounding only.
        backend: "auto" (mamba-ssm on CUDA if it supports the inputs, else torch), "torch" or
            "triton" (mamba-ssm or an error).

    Returns:
        y [B, L, H, P] in x's dtype; the last document's final state [B, H, P, N], float32
        (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an unknown setting, or a backend that does not fit.
        RuntimeError: backend "triton" where mamba-ssm cannot be imported.
    """
    _check_scan(x, dt, A, B, C, D, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, it must be at least 1")
    runs = document_runs(documents, x)
    if use_kernel(backend, "mamba_chunk_scan_combined", x, scan_unfit(x)):
        return kernel_scan(x, dt, A, B, C, D, initial_state, runs)
    return chunked_scan(x, dt, A, B, C, D, initial_state, runs, chunk_size)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of one token.

    Args:
        x: [B, H, P].
        dt: [B, H], >= 0.
        A: [H], negative.
        B: [B, G, N]; G divides H.
        C: [B, G', N]; G' divides H, or is a multiple of H if query heads share a state.
        state: [B, H, P, N]; not modified.
        D: [H], or [G'] if query heads share a state; or None.
        backend: as in `ssd_scan`; mamba-ssm's kernel supports neither shared states nor gradients.

    Returns:
        y [B, max(H, G'), P] in x's dtype and a new state, float32 (float64 for float64 inputs).

    Raises:
        ValueError, RuntimeError: as `ssd_scan`.
    """
    _check_step(x, dt, A, B, C, D, state)
    unfit = step_unfit(x, B, C, state)
    if use_kernel(backend, "selective_state_update", x, unfit):
        return kernel_step(x, dt, A, B, C, state, D)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _step(x, dt, A, B, C, state, D)
    return _step(x, dt, A, B, C, state, D)


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, heads, width = x.shape
    wide_x, wide_dt = x.to(wide), dt.to(wide)
    decay = torch.exp(wide_dt * A.to(wide))  # [B, H]
    u = wide_x * wide_dt[..., None]  # [B, H, P]
    B = _to_heads(B.to(wide), heads)  # [B, H, N]
    new = torch.addcmul(state.to(wide) * decay[..., None, None], u[..., None], B[:, :, None])
    if C.shape[1] <= heads:
        y = torch.einsum("bhpn,bhn->bhp", new, _to_heads(C.to(wide), heads))
    else:
        queries = C.to(wide).view(batch, heads, -1, C.shape[-1])  # [B, H, r, N]
        y = (queries @ new.transpose(-1, -2)).view(batch, -1, width)
    if D is not None:
        shared = y.shape[1] // heads
        wide_x = wide_x if shared == 1 else wide_x.repeat_interleave(shared, dim=1)
        y = torch.addcmul(y, wide_x, D.to(wide)[:, None])
    return y.to(x.dtype), new


def _to_heads(groups: Tensor, heads: int) -> Tensor:
    """[B, G, N] -> [B, H, N]."""
    if groups.shape[1] == heads:
        return groups
    return groups.repeat_interleave(heads // groups.shape[1], dim=1)


def ssd_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The mixing matrix M of the scan, y = M x + D x. Quadratic in L, differentiable.

    M_ts = (C_t . B_s) exp(sum_{s < r <= t} dt_r A) dt_s, 0 above the diagonal (arXiv 2405.21060,
    section 3). MOHAWK (arXiv 2408.10189) matches it in its first stage.

    Args:
        dt: [B, L, H], >= 0.
        A: [H], negative.
        B: [B, L, G, N]; G divides H.
        C: [B, L, G', N]; G' divides H.

    Returns:
        [B, H, L, L] in the widest dtype of the inputs, at least float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    if dt.dim() != 3 or 0 in dt.shape:
        raise ValueError(f"dt must be [B, L, H], none of them 0, got {list(dt.shape)}")
    batch, length, heads = dt.shape
    _check_groups(A, B, C, (batch, length), heads)
    if heads % C.shape[2]:
        raise ValueError(f"C has {C.shape[2]} groups, which do not divide {heads} heads")
    wide = torch.promote_types(torch.promote_types(dt.dtype, B.dtype), torch.float32)
    with torch.autocast(dt.device.type, enabled=False):
        total = (dt.double() * A.double()).cumsum(1).transpose(1, 2)  # [B, H, L]
        gaps = (total[..., :, None] - total[..., None, :]).to(wide)  # [B, H, L, L]
        future = torch.ones(length, length, dtype=torch.bool, device=dt.device).triu(1)
        # Masked before exp: values above the diagonal may overflow, and would give NaN gradients.
        decay = gaps.masked_fill(future, -torch.inf).exp()
        rows, columns = C.to(wide).transpose(1, 2), B.to(wide).transpose(1, 2)  # [B, G, L, N]
        rows = rows.repeat_interleave(heads // rows.shape[1], dim=1)
        columns = columns.repeat_interleave(heads // columns.shape[1], dim=1)
        scores = rows @ columns.transpose(-1, -2)  # [B, H, L, L]
        return scores * decay * dt.to(wide).transpose(1, 2)[:, :, None]


def _check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
) -> None:
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be [B, L, H, P], none of them 0, got {list(x.shape)}")
    batch, length, heads, width = x.shape
    if dt.shape != x.shape[:3]:
        raise ValueError(f"dt must be {list(x.shape[:3])}, got {list(dt.shape)}")
    _check_groups(A, B, C, (batch, length), heads)
    _check_state(D, state, batch, max(heads, C.shape[2]), (heads, width, B.shape[3]))


def _check_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> None:
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be [B, H, P], none of them 0, got {list(x.shape)}")
    batch, heads, width = x.shape
    if dt.shape != x.shape[:2]:
        raise ValueError(f"dt must be {list(x.shape[:2])}, got {list(dt.shape)}")
    _check_groups(A, B, C, (batch,), heads)
    _check_state(D, state, batch, max(heads, C.shape[1]), (heads, width, B.shape[2]))


def _check_groups(A: Tensor, B: Tensor, C: Tensor, lead: tuple[int, ...], heads: int) -> None:
    if A.shape != (heads,):
        raise ValueError(f"A must be [{heads}], got {list(A.shape)}")
    for name, t in (("B", B), ("C", C)):
        if t.dim() != len(lead) + 2 or t.shape[: len(lead)] != lead or 0 in t.shape:
            raise ValueError(f"{name} must be {[*lead, 'groups', 'N']}, got {list(t.shape)}")
    if B.shape[-1] != C.shape[-1]:
        raise ValueError(f"B has state size {B.shape[-1]} but C has {C.shape[-1]}")
    if heads % B.shape[-2]:
        raise ValueError(f"B has {B.shape[-2]} groups, which do not divide {heads} heads")
    if heads % C.shape[-2] and C.shape[-2] % heads:
        raise ValueError(f"C has {C.shape[-2]} groups, which do not fit {heads} heads")


def _check_state(
    D: Tensor | None,
    state: Tensor | None,
    batch: int,
    query_heads: int,
    form: tuple[int, int, int],
) -> None:
    if D is not None and D.shape != (query_heads,):
        raise ValueError(f"D must be [{query_heads}], got {list(D.shape)}")
    if state is not None and state.shape != (batch, *form):
        raise ValueError(f"the state must be {[batch, *form]}, got {list(state.shape)}")
