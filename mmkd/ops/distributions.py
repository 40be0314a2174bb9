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
    enhanced          q sum(w) - w,                       w of `mmkd.ops.divergence`

`hellinger`, `pearson` and `neyman` are multiples of `alpha`, `jeffreys` is `kl` + `reverse_kl`, and
`balanced_kl` is a sum of the two with weights of rows, which get no gradient.
Constants are left out of g: they do not change the gradient.

`alpha` grows with a power of r. As an f-divergence, sum q f(r) with f(r) = (r^a - 1 - a (r - 1)) /
(a (a - 1)), it stays one when f is continued by its tangents outside of [1/R, R]. This is done with
R such that no power exceeds exp(20), so value and gradient agree and stay finite.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mmkd.ops.cells import Cells, cells_of_logits, cells_of_stored
from mmkd.ops.terms import ALPHAS, HeadLoss, SparseRows, TeacherPart

LARGEST_EXPONENT = 20.0
"""Log of the largest power of p / q in an `alpha` divergence."""

NO_CELL = -1e4
"""Logit of a cell that is not compared. Its probability is 0 in both distributions."""

Factor = Tensor | float
"""A number, or one for each row, [C]."""

Part = list[tuple[int, HeadLoss]]
"""Losses, each with its index."""

Slope = tuple[Tensor, Tensor, Tensor | None, float]
"""A loss and its derivative with respect to q, as the methods of `_Distributions` return them."""


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
        theirs: [C, V'] of the teacher, overwritten, or its stored rows; None for `ce` alone.
        rows: [C], indices of the rows.
        part: the losses that cover these rows.
        sums: [losses], float64.
        workspace: holds intermediate results.
    """
    whole = logits.shape[1]
    groups = alike(part, whole)
    grad: Tensor | None = None
    for (temperature, width, read), some in groups.items():
        z = logits[:, :width]
        compared = any(loss.kind != "ce" for _, loss in some)
        if temperature != 1 or len(groups) > 1:
            z = z / temperature
        if not compared or theirs is None:
            found = _Distributions(z, None, workspace).losses(rows, some, sums)
        elif isinstance(theirs, SparseRows):
            cells = cells_of_stored(theirs, rows, read)
            found = _on_cells(z, cells, rows, some, sums, workspace)
        elif not read.is_whole:
            cells = cells_of_logits(theirs[:, :width], read)
            found = _on_cells(z, cells, rows, some, sums, workspace)
        else:
            t = theirs[:, :width]
            t = t / read.temperature if read.temperature != 1 or len(groups) > 1 else t
            found = _Distributions(z, t, workspace).losses(rows, some, sums)
        found = found if temperature == 1 else found.div_(temperature)
        if grad is None and width == whole and len(groups) == 1:
            return found
        grad = torch.zeros_like(logits) if grad is None else grad
        grad[:, :width] += found
    assert grad is not None
    return grad


def alike(part: Part, whole: int) -> dict[tuple[float, int, TeacherPart], Part]:
    """Group losses by what they read: the student's temperature, the number of tokens, and the part
    of the teacher's distribution. A cross-entropy, which reads no teacher, joins any group with the
    softmax that it needs.

    Args:
        part: the losses.
        whole: number of tokens of the head.
    """
    groups: dict[tuple[float, int, TeacherPart], Part] = {}
    for number, loss in part:
        key = (loss.temperature, loss.vocab_size or whole, loss.teacher_part)
        if loss.kind == "ce":
            key = (1.0, key[1], TeacherPart())
        groups.setdefault(key, []).extend((number, computed) for computed in loss.computed())
    for key, some in list(groups.items()):
        if all(loss.kind == "ce" for _, loss in some):
            others = [known for known in groups if known[:2] == key[:2] and known != key]
            if others:
                groups[others[0]].extend(groups.pop(key))
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
        on_p: Factor = 0.0
        slope: Tensor | None = None  # g, summed over losses
        mean: Factor = 0.0  # <q, g>, summed over losses
        target: Tensor | None = None  # of `enhanced`, summed over losses
        for number, loss, weights in self._weighted(rows, part):
            factor = weights * loss.scale
            if loss.kind == "kl":
                value = _dot(self.p, self.ahead) + self.offset
                on_q = on_q + factor
                on_p = on_p + factor
            elif loss.kind == "enhanced":
                value, wanted = self._enhanced(loss, rows)
                on_q = on_q + factor * wanted.sum(1)
                wanted = _scaled(wanted, factor)
                target = wanted if target is None else target.add_(wanted)
            else:
                buffer = self.workspace("slope" if slope is None else "more", *self.q.shape)
                name = "alpha" if loss.kind in ALPHAS else loss.kind
                value, g, inner, constant = getattr(self, f"_{name}")(loss, buffer)
                if loss.scale:  # 0 is for losses that are only measured
                    factor = factor * constant
                    mean = mean + factor * (_dot(self.q, g) if inner is None else inner)
                    g = torch.mul(g, _column(factor), out=buffer)
                    slope = g if slope is None else slope.add_(g)
            sums[number] += (value * weights).sum(dtype=torch.float64)
        if slope is not None:
            grad = slope.add_(_column(on_q - mean)).mul_(self.q)
        else:
            grad = _scaled(self.q, on_q)
        if isinstance(on_p, Tensor):
            grad.addcmul_(self.p, on_p[:, None], value=-1)
        elif on_p:
            grad.add_(self.p, alpha=-on_p)
        if target is not None:
            grad.sub_(target)
        return _less_labels(grad, labels)

    def _weighted(self, rows: Tensor, part: Part) -> Iterator[tuple[int, HeadLoss, Factor]]:
        """The divergences, with the weights of rows in their sums."""
        for number, loss in part:
            weights = loss.factors(rows, self.z.dtype)
            if loss.kind == "balanced_kl":
                share = torch.sigmoid(self._entropy_difference() / loss.kappa)  # [C]
                yield number, replace(loss, kind="kl"), weights * 2 * (1 - share)
                yield number, replace(loss, kind="reverse_kl"), weights * 2 * share
            elif loss.kind != "ce":
                yield number, loss, weights

    def _entropy_difference(self) -> Tensor:
        """Entropy of the student minus that of the teacher, [C]."""
        of_q = self.log_sum - _dot(self.q, self.z)
        of_p = self.log_sum - self.offset - _dot(self.p, self.ahead) - _dot(self.p, self.z)
        return of_q - of_p

    # Each of these returns
    #   the loss of each row, [C]
    #   g / c, [C, V], which may be stored in `buffer`
    #   <q, g / c>, [C], if it is known already, otherwise None
    #   c, a number
    # Each pass over [C, V] that is saved here counts: there are about twenty.

    def _reverse_kl(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        mean = _dot(self.q, self.ahead)
        return -mean - self.offset, self.ahead, mean, -1.0

    def _jsd(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        b = loss.beta
        log_ratio = self._log_ratio(b, buffer)
        mean = _dot(self.q, log_ratio)
        from_p = _dot(self.p, self.ahead) + self.offset + _dot(self.p, log_ratio)
        return b * from_p + (1 - b) * mean, log_ratio, mean, 1 - b

    def _skew_kl(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        a = loss.alpha
        log_ratio = self._log_ratio(a, buffer)
        value = _dot(self.p, self.ahead) + self.offset + _dot(self.p, log_ratio)
        mixture = self._mixture(a, buffer)
        return value, torch.div(self.p, mixture, out=buffer), None, a - 1

    def _skew_reverse_kl(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        a = loss.alpha
        log_ratio = self._log_ratio(1 - a, buffer)
        value = _dot(self.q, log_ratio)
        mixture = self._mixture(1 - a, self.workspace("mixture", *self.q.shape))
        g = log_ratio.sub_(torch.div(self.q, mixture, out=mixture), alpha=a)
        return value, g, None, 1.0

    def _soft_reverse_kl(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        # log((p + q) / 2p) = log((1 + q / p) / 2)
        log_inverse_ratio = torch.add(self.ahead, self.offset[:, None], out=buffer).neg_()
        g = torch.logaddexp(log_inverse_ratio, log_inverse_ratio.new_zeros(()), out=buffer).sub_(
            math.log(2)
        )
        mean = _dot(self.q, g)
        return _dot(self.p, g) + mean, g, mean, 1.0

    def _alpha(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        # f is f(R) + f'(R) (r - R) where r > R, so that q f = q g + p f' everywhere.
        a, factor = loss.order
        bound = LARGEST_EXPONENT / max(abs(a), abs(a - 1))
        log_r = torch.add(self.ahead, self.offset[:, None], out=buffer).clamp_(-bound, bound)
        slope = torch.mul(log_r, a - 1, out=self.workspace("power", *buffer.shape)).expm1_()
        g = log_r.mul_(a).expm1_()
        mean = _dot(self.q, g)
        value = _dot(self.p, slope) / (a - 1) - mean / a
        return factor * value, g, mean, -factor / a

    def _enhanced(self, loss: HeadLoss, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, [C], and the target w, [C, V], which is not normalised."""
        assert loss.targets is not None
        label = loss.targets[rows, None]
        target = torch.pow(self.p, loss.gamma)
        own = self.p.gather(1, label)
        target.scatter_(1, label, own.log1p().mul_(loss.gamma).expm1_())
        total = target.sum(1)
        entropy = torch.xlogy(target, target, out=self.workspace("power", *target.shape)).sum(1)
        value = entropy - torch.xlogy(total, total) + total * self.log_sum - _dot(target, self.z)
        return value, target

    def _tvd(self, loss: HeadLoss, buffer: Tensor) -> Slope:
        apart = torch.sub(self.q, self.p, out=buffer)
        return 0.5 * apart.abs().sum(1), apart.sign_(), None, 0.5

    def _mixture(self, share: float, buffer: Tensor) -> Tensor:
        """share p + (1 - share) q, clamped to positive values, [C, V]."""
        made = torch.mul(self.p, share, out=buffer).add_(self.q, alpha=1 - share)
        return made.clamp_(min=torch.finfo(made.dtype).tiny)

    def _log_ratio(self, share: float, buffer: Tensor) -> Tensor:
        """log q - log(share p + (1 - share) q), [C, V]."""
        return self._mixture(share, buffer).log_().neg_().add_(self.z).sub_(self.log_sum[:, None])


def _on_cells(
    z: Tensor, cells: Cells, rows: Tensor, part: Part, sums: Tensor, workspace: Workspace
) -> Tensor:
    """Add the losses against a part of the teacher's tokens to `sums`, and return the gradient of
    the scaled losses, [C, V].

    The k tokens and the set of all others form a vocabulary of k + 1 entries, with logits log q.
    The gradient of the last entry is distributed over its tokens in proportion to q.
    """
    q, log_sum = _softmax(z, workspace("q", *z.shape))
    ids, kept = cells.ids, cells.kept  # [C, k], [C, k + 1]
    known = q.gather(1, ids)
    q.scatter_(1, ids, known.masked_fill(kept[:, :-1], 0))
    rest = q.sum(1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    ours = torch.cat([z.gather(1, ids) - log_sum[:, None], rest.log()], 1)  # [C, k + 1]
    ours = ours.masked_fill_(~kept, NO_CELL)
    theirs = cells.log_p.to(z.dtype).masked_fill(~kept, NO_CELL)
    compared = [(number, _by_cell(loss, cells, rows)) for number, loss in part if loss.kind != "ce"]
    by_cell = _Distributions(ours, theirs, Workspace(z.dtype, z.device)).losses(
        rows, compared, sums
    )
    labels, on_q = _add_labels(z, log_sum, rows, part, sums)
    share = by_cell[:, -1:] / rest  # [C, 1]
    grad = q.mul_(share + _column(on_q))
    own = torch.where(kept[:, :-1], by_cell[:, :-1], known * share)
    grad.scatter_(1, ids, own + _column(on_q) * known)
    return _less_labels(grad, labels)


def _by_cell(loss: HeadLoss, cells: Cells, rows: Tensor) -> HeadLoss:
    """The loss with the cells of its labels in place of their tokens."""
    if loss.kind != "enhanced":
        return loss
    assert loss.targets is not None
    same = cells.kept[:, :-1] & (cells.ids == loss.targets[rows, None])
    found = torch.where(same.any(1), same.int().argmax(1), cells.ids.shape[1])
    return replace(loss, targets=loss.targets.index_copy(0, rows, found))


Labels = list[tuple[Tensor, Factor]]


def _add_labels(
    z: Tensor, log_sum: Tensor, rows: Tensor, part: Part, sums: Tensor
) -> tuple[Labels, Factor]:
    """Add the cross-entropies to `sums`, and return their labels [C, 1] with factors, and the sum
    of all factors."""
    labels: Labels = []
    whole: Factor = 0.0
    for number, loss in part:
        if loss.kind == "ce":
            assert loss.targets is not None
            chosen = loss.targets[rows, None]
            weights = loss.factors(rows, z.dtype)
            value = (log_sum - z.gather(1, chosen)[:, 0]) * weights
            sums[number] += value.sum(dtype=torch.float64)
            labels.append((chosen, weights * loss.scale))
            whole = whole + weights * loss.scale
    return labels, whole


def _less_labels(grad: Tensor, labels: Labels) -> Tensor:
    for chosen, factor in labels:
        less = torch.ones_like(chosen, dtype=grad.dtype).mul_(_column(factor))
        grad.scatter_add_(1, chosen, less.neg_())
    return grad


def _column(factor: Factor) -> Factor:
    return factor[:, None] if isinstance(factor, Tensor) else factor


def _scaled(x: Tensor, factor: Factor) -> Tensor:
    """x [C, V] times a factor of its rows, in place."""
    return x.mul_(_column(factor)) if isinstance(factor, Tensor) or factor != 1 else x


def _softmax(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, [C, V], stored in `out`, and log-sum-exp, [C]."""
    torch.softmax(x, -1, out=out)
    # On CPUs, amax takes a tenth of the time of argmax, which is as slow as the softmax.
    return out, x.amax(-1) - out.amax(-1).log_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of corresponding rows, [C]."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
