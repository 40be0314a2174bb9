"""Optimal transport between groups of a student's and a teacher's distributions.

Let q_1 ... q_n and p_1 ... p_n be the distributions of a group of n rows, W_ij = |q_i - p_j|_1, and

    OT(q, p) = min_P  sum_ij P_ij W_ij + e KL(P || 1/n^2),    P with row and column sums of 1/n
    S        = OT(q, p) - 1/2 OT(q, q) - 1/2 OT(p, p)

The loss of a group is n S. This is in the spirit of SinKD (arXiv 2402.17110), whose loss is the
cost sum_ij P_ij W_ij over a batch, which is not 0 at equal models. S is 0 there, and at convergence
never negative (Feydy et al., arXiv 1810.08278, theorem 1).

With potentials f and g, OT is the largest value of the dual problem

    mean f + mean g - e (sum_ij P_ij - 1),    P_ij = exp((f_i + g_j - W_ij) / e) / n^2

Both potentials are updated at the same time, in log space, and averaged with the former ones. So
equal rows get equal potentials after any number of iterations, and S and its gradient are exactly
those of equal models. With potentials fixed, dOT/dW_ij = P_ij (envelope theorem), so

    dS/dq_i = sum_j P_ij sign(q_i - p_j) - 1/2 sum_j (P'_ij + P'_ji) sign(q_i - q_j)

with the plan P' of OT(q, q). The loss does not depend on which rows belong together: exchanging
rows of the teacher within a group changes nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkd.ops.head_losses import (
    CHUNK_BYTES,
    add_gradients,
    differentiable,
    new_gradients,
    project,
    rows_per_chunk,
    scaled_gradients,
)
from mmkd.ops.terms import Head
from mmkd.ops.token_logps import wide

BUFFERS = 7
"""Blocks of [rows of a chunk, V] that are there at one time."""


def linear_sinkhorn(
    student: Head,
    teacher: Head,
    sizes: Sequence[int],
    *,
    temperature: float = 1.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    vocab_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> Tensor:
    """The sum over groups of their sizes times their debiased transport costs.

    Args:
        student: N rows, group by group; gets gradients where `requires_grad` is set.
        teacher: the same rows; gets none.
        sizes: number of rows of each group, at least 1; together N.
        temperature: divides both logits.
        epsilon: weight of the entropic term.
        iterations: updates of the potentials.
        vocab_size: later rows of both heads get probability 0; None if the heads have equal sizes.
        memory: bytes for the logits of a chunk of groups and the tensors computed from them. A
            chunk has one group at least.

    Returns:
        A scalar in at least float32, differentiable once. Without rows: 0 with zero gradients.

    Raises:
        ValueError: shapes or sizes that do not match.
    """
    count = len(student.hidden)
    if len(teacher.hidden) != count or sum(sizes) != count or min(sizes, default=1) < 1:
        raise ValueError(
            f"{count} student rows, {len(teacher.hidden)} teacher rows and groups of "
            f"{sum(sizes)} rows: the three must be equal, and no group may be empty"
        )
    if vocab_size is None and len(student.weight) != len(teacher.weight):
        raise ValueError(
            f"the heads have {len(student.weight)} (student) and {len(teacher.weight)} (teacher) "
            "rows: give vocab_size, the number of tokens that both share"
        )
    if temperature <= 0 or epsilon <= 0 or iterations < 1:
        raise ValueError(
            f"temperature {temperature} and epsilon {epsilon} must be positive, and iterations "
            f"{iterations} at least 1"
        )
    width = vocab_size or len(student.weight)
    mine, theirs = (
        Head(h.hidden, h.weight[:width], None if h.bias is None else h.bias[:width])
        for h in (student, teacher)
    )
    largest = max(sizes, default=1)
    chunk = rows_per_chunk(count, width, None, 4 * BUFFERS, memory) // largest
    settings = (temperature, epsilon, iterations, max(1, chunk))
    with torch.autocast(mine.hidden.device.type, enabled=False):
        tensors = differentiable(mine.hidden, mine.weight, mine.bias)
        return _Sinkhorn.apply(*tensors, theirs, tuple(sizes), settings)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Head,
        sizes: tuple[int, ...],
        settings: tuple[float, float, int, int],
    ) -> Tensor:
        temperature, epsilon, iterations, chunk = settings
        dtype = wide(hidden)
        own = weight.to(hidden.dtype)
        grads = new_gradients(ctx.needs_input_grad, hidden, weight, bias, dtype)
        total = hidden.new_zeros((), dtype=torch.float64)
        start = 0
        for first in range(0, len(sizes), chunk):
            some = sizes[first : first + chunk]
            rows = slice(start, start + sum(some))
            start = rows.stop
            q = project(hidden[rows], own, bias).div_(temperature).softmax(1)  # [C, V]
            p = project(teacher.hidden[rows], teacher.weight, teacher.bias)
            p = p.div_(temperature).softmax(1).to(q.dtype)
            value, slope = _transport(q, p, some, epsilon, iterations)
            total += value
            grad = slope.sub_((q * slope).sum(1, keepdim=True)).mul_(q).div_(temperature)
            add_gradients(grads, grad, rows, hidden, own)
        ctx.grads = grads
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return (*scaled_gradients(ctx, grad_outputs[0]), None, None, None)


def _transport(
    q: Tensor, p: Tensor, sizes: Sequence[int], epsilon: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The sum of the groups' losses, float64, and its gradient with respect to q [C, V]."""
    size = torch.tensor(sizes, device=q.device)
    largest = max(sizes)
    costs = q.new_zeros(3, len(sizes), largest, largest)  # [3, G, n, n], smaller groups padded
    groups = list(zip(q.split(list(sizes)), p.split(list(sizes)), strict=True))
    for number, (x, y) in enumerate(groups):
        for problem, (a, b) in enumerate(((x, y), (x, x), (y, y))):
            costs[problem, number, : len(x), : len(x)] = torch.cdist(a, b, p=1.0)
    values, plans = _plans(costs, size, epsilon, iterations)
    value = (size * (values[0] - 0.5 * values[1] - 0.5 * values[2])).sum(dtype=torch.float64)
    plans = plans * size[:, None, None]
    between, own = plans[0], 0.5 * (plans[1] + plans[1].mT)  # [G, n, n]
    slope = torch.zeros_like(q)
    parts = slope.split(list(sizes))
    for number, ((x, y), part) in enumerate(zip(groups, parts, strict=True)):
        for j in range(len(x)):  # one [n, V] at a time, not [n, n, V]
            part.addcmul_(between[number, : len(x), j, None], (x - y[j]).sign_())
            part.addcmul_(own[number, : len(x), j, None], (x - x[j]).sign_(), value=-1)
    return value, slope


def _plans(costs: Tensor, sizes: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Transport costs and plans.

    Args:
        costs: [K, G, n, n], costs of K problems for each of G groups.
        sizes: [G], rows and columns of each group; later ones are padding.
        epsilon, iterations: as in `linear_sinkhorn`.

    Returns:
        The values of the dual problem, [K, G], and the plans, [K, G, n, n], 0 at padding.
    """
    real = torch.arange(costs.shape[-1], device=costs.device) < sizes[:, None]  # [G, n]
    log_share = torch.where(real, -sizes[:, None].to(costs.dtype).log(), -math.inf)
    f = costs.new_zeros(costs.shape[:-1])  # [K, G, n]
    g = f.clone()

    def update(costs: Tensor, other: Tensor) -> Tensor:
        """The best potential of rows [.., n] for one of columns."""
        scaled = log_share[:, None, :] + (other[..., None, :] - costs) / epsilon
        return -epsilon * scaled.logsumexp(-1)

    for _ in range(iterations):
        f, g = (f + update(costs, g)) / 2, (g + update(costs.mT, f)) / 2
    exponent = (f[..., :, None] + g[..., None, :] - costs) / epsilon
    plans = (log_share[:, :, None] + log_share[:, None, :] + exponent).exp()
    shares = log_share.exp()
    values = (shares * (f + g)).sum(-1) - epsilon * (plans.sum((-2, -1)) - 1)
    return values, plans
