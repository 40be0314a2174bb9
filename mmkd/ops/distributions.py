"""Losses of rows of logits, with their gradients written down.

With z the student's logits over T, q and p the student's and the teacher's distribution, and
g = dL/dq,

    dL/dz = q (g - <q, g>)

    ce                q - 1[y]
    kl                q - p                               (g = -p / q)
    reverse_kl        g = log q - log p
    jsd               g = (1 - b) log(q / m),             m = b p + (1 - b) q
    skew_kl           g = -(1 - a) p / m,                 m = a p + (1 - a) q
    skew_reverse_kl   g = log(q / m) - a q / m,           m = a q + (1 - a) p
    soft_reverse_kl   g = log((p + q) / 2p)
    alpha             g = -(r^a - 1) / a,                 r = p / q
    tvd               g = -1/2 sign(p - q)

`hellinger`, `pearson` and `neyman` are multiples of `alpha`, and `jeffreys` is `kl` + `reverse_kl`.
Constants are left out of g: they do not change the gradient.

`alpha` grows with a power of r. As an f-divergence, sum q f(r) with f(r) = (r^a - 1 - a (r - 1)) /
(a (a - 1)), it stays one when f is continued by its tangents outside of [1/R, R]. This is done with
R such that no power exceeds exp(20), so value and gradient agree and stay finite.
"""

import math

import torch
from torch import Tensor

from mmkd.ops.terms import ALPHAS, HeadLoss, SparseRows

LARGEST_EXPONENT = 20.0
"""Log of the largest power of p / q in an `alpha` divergence."""

LEAST_LOG = -80.0
"""Of a stored rest: a mass of nothing would have no logarithm."""

Part = list[tuple[int, HeadLoss]]
"""Losses with their numbers."""


class Memory:
    """Blocks of memory that chunk after chunk uses again: fresh ones cost as much as a product."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._blocks: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        block = self._blocks.get(name)
        if block is None or block.numel() < rows * width:
            block = torch.empty(rows * width, dtype=self.dtype, device=self.device)
            self._blocks[name] = block
        return block[: rows * width].view(rows, width)


def chunk_losses(
    logits: Tensor,
    theirs: Tensor | SparseRows | None,
    rows: Tensor,
    part: Part,
    sums: Tensor,
    memory: Memory,
) -> Tensor:
    """Add the chunk's losses to `sums`; returns the total's gradient by its logits.

    Args:
        logits: [C, V] of the student; lost afterwards.
        theirs: [C, V'] of the teacher, lost afterwards, or its stored rows.
        rows: [C], numbers of the rows.
        part: the losses that cover these rows.
        sums: [losses].
        memory: for what is made on the way.
    """
    whole = logits.shape[1]
    groups = alike(part, whole)
    grad: Tensor | None = None
    for (temperature, width), some in groups.items():
        z = logits[:, :width]
        compared = any(loss.kind != "ce" for _, loss in some)
        t = theirs[:, :width] if compared and isinstance(theirs, Tensor) else None
        if temperature != 1 or len(groups) > 1:
            z = z / temperature
            t = None if t is None else t / temperature
        if compared and isinstance(theirs, SparseRows):
            found = _sparse(z, theirs, rows, some, sums, memory)
        else:
            found = _Distributions(z, t, memory).losses(rows, some, sums)
        found = found if temperature == 1 else found.div_(temperature)
        if grad is None and width == whole and len(groups) == 1:
            return found
        grad = torch.zeros_like(logits) if grad is None else grad
        grad[:, :width] += found
    assert grad is not None
    return grad


def alike(part: Part, whole: int) -> dict[tuple[float, int], Part]:
    """Losses by what they make distributions of: a temperature, and the width of `whole`."""
    groups: dict[tuple[float, int], Part] = {}
    for number, loss in part:
        temperature = 1.0 if loss.kind == "ce" else loss.temperature
        group = groups.setdefault((temperature, loss.vocab_size or whole), [])
        group += [(number, computed) for computed in loss.computed()]
    return groups


class _Distributions:
    """Student's and teacher's distribution of a chunk's rows, at one temperature.

    Args:
        z: [C, V], the student's logits.
        t: [C, V], the teacher's, or None; lost afterwards.
        memory: for what is made on the way.
    """

    def __init__(self, z: Tensor, t: Tensor | None, memory: Memory):
        self.z, self.memory = z, memory
        self.q, self.log_sum = _softmax(z, memory("q", *z.shape))
        if t is not None:
            self.p, log_sum = _softmax(t, memory("p", *t.shape))
            self.ahead = t.sub_(z)  # log p - log q, but for a number a row
            self.offset = self.log_sum - log_sum  # [C]

    def losses(self, rows: Tensor, part: Part, sums: Tensor) -> Tensor:
        """Add to `sums`; returns the gradient of the scaled losses, [C, V]."""
        labels, on_q = _add_labels(self.z, self.log_sum, rows, part, sums)
        on_p = 0.0
        slope: Tensor | None = None  # g, summed over losses
        for number, loss in part:
            if loss.kind == "ce":
                continue
            if loss.kind == "kl":
                value = _dot(self.p, self.ahead) + self.offset
                on_q += loss.scale
                on_p += loss.scale
            else:
                room = self.memory("slope" if slope is None else "more", *self.q.shape)
                name = "alpha" if loss.kind in ALPHAS else loss.kind
                value, g = getattr(self, f"_{name}")(loss, room)
                g = g.mul_(loss.scale) if loss.scale != 1 else g
                slope = g if slope is None else slope.add_(g)
            sums[number] += value.sum(dtype=torch.float64)
        if slope is not None:
            grad = slope.add_((on_q - _dot(self.q, slope))[:, None]).mul_(self.q)
        else:
            grad = self.q.mul_(on_q) if on_q != 1 else self.q
        if on_p:
            grad.add_(self.p, alpha=-on_p)
        return _less_labels(grad, labels)

    # Each returns the loss's value by row, [C], and g in `room`, [C, V].

    def _reverse_kl(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        return -_dot(self.q, self.ahead) - self.offset, torch.neg(self.ahead, out=room)

    def _jsd(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        b = loss.beta
        lead = self._lead(b, room)
        from_p = _dot(self.p, self.ahead) + self.offset + _dot(self.p, lead)
        value = b * from_p + (1 - b) * _dot(self.q, lead)
        return value, lead.mul_(1 - b)

    def _skew_kl(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        a = loss.alpha
        lead = self._lead(a, room)
        value = _dot(self.p, self.ahead) + self.offset + _dot(self.p, lead)
        mixture = self._mixture(a, room)
        return value, torch.div(self.p, mixture, out=room).mul_(a - 1)

    def _skew_reverse_kl(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        a = loss.alpha
        lead = self._lead(1 - a, room)
        value = _dot(self.q, lead)
        mixture = self._mixture(1 - a, self.memory("mixture", *self.q.shape))
        return value, lead.sub_(torch.div(self.q, mixture, out=mixture), alpha=a)

    def _soft_reverse_kl(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        # log((p + q) / 2p) = log((1 + q / p) / 2)
        behind = torch.add(self.ahead, self.offset[:, None], out=room).neg_()
        g = torch.logaddexp(behind, behind.new_zeros(()), out=room).sub_(math.log(2))
        return _dot(self.p, g) + _dot(self.q, g), g

    def _alpha(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        # f is f(R) + f'(R) (r - R) where r > R, so that q f = q g + p f' everywhere.
        a, factor = loss.order
        bound = LARGEST_EXPONENT / max(abs(a), abs(a - 1))
        log_r = torch.add(self.ahead, self.offset[:, None], out=room).clamp_(-bound, bound)
        slope = torch.mul(log_r, a - 1, out=self.memory("power", *room.shape)).expm1_()
        g = log_r.mul_(a).expm1_()
        value = _dot(self.p, slope) / (a - 1) - _dot(self.q, g) / a
        return factor * value, g.mul_(-factor / a)

    def _tvd(self, loss: HeadLoss, room: Tensor) -> tuple[Tensor, Tensor]:
        apart = torch.sub(self.q, self.p, out=room)
        return 0.5 * apart.abs().sum(1), apart.sign_().mul_(0.5)

    def _mixture(self, share: float, room: Tensor) -> Tensor:
        """share p + (1 - share) q, nowhere 0."""
        made = torch.mul(self.p, share, out=room).add_(self.q, alpha=1 - share)
        return made.clamp_(min=torch.finfo(made.dtype).tiny)

    def _lead(self, share: float, room: Tensor) -> Tensor:
        """log q - log(share p + (1 - share) q), [C, V]."""
        return self._mixture(share, room).log_().neg_().add_(self.z).sub_(self.log_sum[:, None])


def _sparse(
    z: Tensor, stored: SparseRows, rows: Tensor, part: Part, sums: Tensor, memory: Memory
) -> Tensor:
    """Add losses against stored rows to `sums`; returns the gradient of the scaled ones, [C, V].

    The student's k tokens and its rest are cells of a small vocabulary, with their logits log q;
    the gradient by the rest's logit falls on its tokens by their share of it.
    """
    q, log_sum = _softmax(z, memory("q", *z.shape))
    at = stored.at[rows]
    ids = stored.ids[at]  # [C, k]
    log_p = torch.cat([stored.log_probs[at], stored.log_rest[at, None]], 1).to(z.dtype)
    known = q.gather(1, ids)
    rest = q.scatter_(1, ids, 0).sum(1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    cells = torch.cat([z.gather(1, ids) - log_sum[:, None], rest.log()], 1)  # [C, k + 1]
    compared = [(number, loss) for number, loss in part if loss.kind != "ce"]
    fresh = Memory(z.dtype, z.device)
    theirs = log_p.clamp_(min=LEAST_LOG)
    by_cell = _Distributions(cells, theirs, fresh).losses(rows, compared, sums)
    labels, on_q = _add_labels(z, log_sum, rows, part, sums)
    grad = q.mul_(by_cell[:, -1:] / rest + on_q)
    grad.scatter_(1, ids, by_cell[:, :-1] + on_q * known)
    return _less_labels(grad, labels)


Labels = list[tuple[Tensor, float]]


def _add_labels(
    z: Tensor, log_sum: Tensor, rows: Tensor, part: Part, sums: Tensor
) -> tuple[Labels, float]:
    """Add cross-entropies to `sums`; returns labels [C, 1] with scales, and the sum of scales."""
    labels: Labels = []
    for number, loss in part:
        if loss.kind == "ce":
            assert loss.targets is not None
            chosen = loss.targets[rows, None]
            sums[number] += (log_sum - z.gather(1, chosen)[:, 0]).sum(dtype=torch.float64)
            labels.append((chosen, loss.scale))
    return labels, sum(scale for _, scale in labels)


def _less_labels(grad: Tensor, labels: Labels) -> Tensor:
    for chosen, scale in labels:
        grad.scatter_add_(1, chosen, torch.full_like(chosen, -scale, dtype=grad.dtype))
    return grad


def _softmax(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [C, V] in `out`, and log sum exp [C]."""
    torch.softmax(x, -1, out=out)
    top = x.argmax(-1, keepdim=True)
    return out, (x.gather(1, top) - out.gather(1, top).log_())[:, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, [C]."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
