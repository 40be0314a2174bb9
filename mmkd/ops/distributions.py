"""Losses and their analytic gradients for a chunk of rows of logits.

Let z be the student's logits divided by T, q and p the distributions of student and teacher, and
g = dL/dq:

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
"""Smallest log-probability of the tokens that are not stored. Their probability may be 0."""

Part = list[tuple[int, HeadLoss]]
"""Losses, each with its index."""


class Workspace:
    """Buffers that are reused for each chunk. Allocating them anew would cost as much time as a
    matrix product."""

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
    workspace: Workspace,
) -> Tensor:
    """Add the losses of a chunk to `sums`, and return the gradient of the total with respect to the
    logits, [C, V].

    Args:
        logits: [C, V] of the student; overwritten.
        theirs: [C, V'] of the teacher, overwritten, or its stored rows.
        rows: [C], indices of the rows.
        part: the losses that cover these rows.
        sums: [losses], float64.
        workspace: holds intermediate results.
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
            found = _sparse(z, theirs, rows, some, sums, workspace)
        else:
            found = _Distributions(z, t, workspace).losses(rows, some, sums)
        found = found if temperature == 1 else found.div_(temperature)
        if grad is None and width == whole and len(groups) == 1:
            return found
        grad = torch.zeros_like(logits) if grad is None else grad
        grad[:, :width] += found
    assert grad is not None
    return grad


def alike(part: Part, whole: int) -> dict[tuple[float, int], Part]:
    """Group losses by the softmax that they need: its temperature and number of tokens.

    Args:
        part: the losses.
        whole: number of tokens of the head.
    """
    groups: dict[tuple[float, int], Part] = {}
    for number, loss in part:
        temperature = 1.0 if loss.kind == "ce" else loss.temperature
        group = groups.setdefault((temperature, loss.vocab_size or whole), [])
        group += [(number, computed) for computed in loss.computed()]
    return groups


class _Distributions:
    """Distributions of student and teacher for a chunk of rows, at one temperature.

    Args:
        z: [C, V], the student's logits.
        t: [C, V], the teacher's, or None; overwritten.
        workspace: holds intermediate results.
    """

    def __init__(self, z: Tensor, t: Tensor | None, workspace: Workspace):
        self.z, self.workspace = z, workspace
        self.q, self.log_sum = _softmax(z, workspace("q", *z.shape))
        if t is not None:
            self.p, log_sum = _softmax(t, workspace("p", *t.shape))
            self.ahead = t.sub_(z)  # log p - log q - offset
            self.offset = self.log_sum - log_sum  # [C]

    def losses(self, rows: Tensor, part: Part, sums: Tensor) -> Tensor:
        """Add the losses to `sums`, and return the gradient of the scaled losses, [C, V]."""
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
                buffer = self.workspace("slope" if slope is None else "more", *self.q.shape)
                name = "alpha" if loss.kind in ALPHAS else loss.kind
                value, g = getattr(self, f"_{name}")(loss, buffer)
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

    # Each of these returns the loss of each row, [C], and g, [C, V], which is stored in `buffer`.

    def _reverse_kl(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        return -_dot(self.q, self.ahead) - self.offset, torch.neg(self.ahead, out=buffer)

    def _jsd(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        b = loss.beta
        log_ratio = self._log_ratio(b, buffer)
        from_p = _dot(self.p, self.ahead) + self.offset + _dot(self.p, log_ratio)
        value = b * from_p + (1 - b) * _dot(self.q, log_ratio)
        return value, log_ratio.mul_(1 - b)

    def _skew_kl(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        a = loss.alpha
        log_ratio = self._log_ratio(a, buffer)
        value = _dot(self.p, self.ahead) + self.offset + _dot(self.p, log_ratio)
        mixture = self._mixture(a, buffer)
        return value, torch.div(self.p, mixture, out=buffer).mul_(a - 1)

    def _skew_reverse_kl(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        a = loss.alpha
        log_ratio = self._log_ratio(1 - a, buffer)
        value = _dot(self.q, log_ratio)
        mixture = self._mixture(1 - a, self.workspace("mixture", *self.q.shape))
        return value, log_ratio.sub_(torch.div(self.q, mixture, out=mixture), alpha=a)

    def _soft_reverse_kl(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        # log((p + q) / 2p) = log((1 + q / p) / 2)
        log_inverse_ratio = torch.add(self.ahead, self.offset[:, None], out=buffer).neg_()
        g = torch.logaddexp(log_inverse_ratio, log_inverse_ratio.new_zeros(()), out=buffer).sub_(
            math.log(2)
        )
        return _dot(self.p, g) + _dot(self.q, g), g

    def _alpha(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        # f is f(R) + f'(R) (r - R) where r > R, so that q f = q g + p f' everywhere.
        a, factor = loss.order
        bound = LARGEST_EXPONENT / max(abs(a), abs(a - 1))
        log_r = torch.add(self.ahead, self.offset[:, None], out=buffer).clamp_(-bound, bound)
        slope = torch.mul(log_r, a - 1, out=self.workspace("power", *buffer.shape)).expm1_()
        g = log_r.mul_(a).expm1_()
        value = _dot(self.p, slope) / (a - 1) - _dot(self.q, g) / a
        return factor * value, g.mul_(-factor / a)

    def _tvd(self, loss: HeadLoss, buffer: Tensor) -> tuple[Tensor, Tensor]:
        apart = torch.sub(self.q, self.p, out=buffer)
        return 0.5 * apart.abs().sum(1), apart.sign_().mul_(0.5)

    def _mixture(self, share: float, buffer: Tensor) -> Tensor:
        """share p + (1 - share) q, clamped to positive values, [C, V]."""
        made = torch.mul(self.p, share, out=buffer).add_(self.q, alpha=1 - share)
        return made.clamp_(min=torch.finfo(made.dtype).tiny)

    def _log_ratio(self, share: float, buffer: Tensor) -> Tensor:
        """log q - log(share p + (1 - share) q), [C, V]."""
        return self._mixture(share, buffer).log_().neg_().add_(self.z).sub_(self.log_sum[:, None])


def _sparse(
    z: Tensor, stored: SparseRows, rows: Tensor, part: Part, sums: Tensor, workspace: Workspace
) -> Tensor:
    """Add the losses against stored rows to `sums`, and return the gradient of the scaled losses,
    [C, V].

    The k stored tokens and the set of all others form a vocabulary of k + 1 entries, with logits
    log q. The gradient of the last entry is distributed over its tokens in proportion to q.
    """
    q, log_sum = _softmax(z, workspace("q", *z.shape))
    at = stored.at[rows]
    ids = stored.ids[at]  # [C, k]
    log_p = torch.cat([stored.log_probs[at], stored.log_rest[at, None]], 1).to(z.dtype)
    known = q.gather(1, ids)
    rest = q.scatter_(1, ids, 0).sum(1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    cells = torch.cat([z.gather(1, ids) - log_sum[:, None], rest.log()], 1)  # [C, k + 1]
    compared = [(number, loss) for number, loss in part if loss.kind != "ce"]
    fresh = Workspace(z.dtype, z.device)
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
    """Add the cross-entropies to `sums`, and return their labels [C, 1] with scales, and the sum of
    all scales."""
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
    """Softmax, [C, V], stored in `out`, and log-sum-exp, [C]."""
    torch.softmax(x, -1, out=out)
    top = x.argmax(-1, keepdim=True)
    return out, (x.gather(1, top) - out.gather(1, top).log_())[:, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of corresponding rows, [C]."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
