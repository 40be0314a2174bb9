# mypy: disallow-untyped-defs=False
"""A chunk's losses by a Triton kernel: `mmkd.ops.distributions` for CUDA tensors.

One program handles one row of logits and reads its vocabulary in blocks: once for the log-sum-exp
    of
student and teacher, once for <q, g> if a loss needs it, and once for the gradient, which overwrites
the student's logits. Formulas and names are those of `mmkd.ops.distributions`.

Importing this module needs triton; `mmkd.ops.backends` does it where a call may take the kernel.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkd.ops.distributions import LARGEST_EXPONENT, Part, alike
from mmkd.ops.terms import HeadLoss, SparseRows

BLOCK = 4096
WARPS = 16
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Log-probability of indices past the vocabulary. Its exp is 0, and 0 times it is 0 (unlike -inf).
OUTSIDE = tl.constexpr(-1e4)
LARGEST = tl.constexpr(LARGEST_EXPONENT)
LOG_2 = tl.constexpr(math.log(2))


def chunk_losses(
    logits: Tensor, theirs: Tensor | SparseRows | None, rows: Tensor, part: Part, sums: Tensor
) -> Tensor:
    """Add the chunk's losses to `sums`; returns the total's gradient by its logits.

    Args:
        logits: [C, V] of the student, float32 or a smaller dtype; overwritten.
        theirs: [C, V'] of the teacher, float32 or a smaller dtype.
        rows: [C], indices of the rows.
        part: the losses that cover these rows.
        sums: [losses].
    """
    assert not isinstance(theirs, SparseRows)
    groups = alike(part, logits.shape[1])
    if len(groups) > 1:
        grad = torch.zeros_like(logits, dtype=torch.float32)
        for (temperature, width, read), some in groups.items():
            temperatures = (temperature, read.temperature)
            _launch(logits, theirs, grad, rows, some, sums, temperatures, width)
        return grad
    (((temperature, width, read), some),) = groups.items()
    _launch(logits, theirs, logits, rows, some, sums, (temperature, read.temperature), width)
    logits[:, width:] = 0
    return logits


def _launch(
    logits: Tensor,
    theirs: Tensor | None,
    grad: Tensor,
    rows: Tensor,
    part: Part,
    sums: Tensor,
    temperatures: tuple[float, float],
    width: int,
) -> None:
    """Losses at one temperature of the student and one of the teacher. Their gradient replaces
    `logits`, or is added to another `grad`."""
    part = sorted(part, key=lambda item: item[1].kind != "ce")
    losses = [loss for _, loss in part]
    targets = [x.targets[rows] for x in losses if x.kind == "ce" and x.targets is not None]
    labels = torch.stack(targets, 1) if targets else None  # [C, ces]
    # torch gathers these before the kernel overwrites them, and raises for labels out of range.
    chosen = None if labels is None else logits[:, :width].gather(1, labels)
    kinds = tuple(loss.kind for loss in losses)
    compared = any(kind != "ce" for kind in kinds)
    t = theirs if compared else None
    values = sums.new_empty(len(logits), len(part), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _row[(len(logits),)](
            logits,
            t,
            grad,
            labels,
            chosen,
            values,
            logits.stride(0),
            0 if t is None else t.stride(0),
            grad.stride(0),
            width,
            float(temperatures[0]),
            float(temperatures[1]),
            tuple(float(loss.scale) for loss in losses),
            tuple(_share(loss) for loss in losses),
            kinds=kinds,
            ces=kinds.count("ce"),
            sloped=any(kind not in ("ce", "kl") for kind in kinds),
            slots=triton.next_power_of_2(len(part)),
            adds=grad is not logits,
            block=min(BLOCK, triton.next_power_of_2(width)),
            num_warps=WARPS,
            enable_fp_fusion=True,  # the default, which triton 3.10 will change
        )
    for (number, _), value in zip(part, values.sum(0, dtype=torch.float64), strict=True):
        sums[number] += value


def _share(loss: HeadLoss) -> float:
    return float(loss.beta if loss.kind == "jsd" else loss.order[0])


@triton.jit
def _row(
    z,
    t,
    grad,
    labels,
    chosen,
    values,
    z_stride,
    t_stride,
    grad_stride,
    width,
    temperature,
    t_temperature,
    scales,
    shares,
    kinds: tl.constexpr,
    ces: tl.constexpr,
    sloped: tl.constexpr,
    slots: tl.constexpr,
    adds: tl.constexpr,
    block: tl.constexpr,
):
    """A row's losses and their gradient.

    Args:
        z, t, grad: [C, V], with strides of rows; t is None where no loss needs it.
        labels, chosen: [C, ces], the tokens of cross-entropies and their logits, or None.
        values: [C, losses], output.
        width: number of tokens with a probability.
        temperature, t_temperature: divide z and t.
        scales, shares: by loss; a share is beta, alpha or the order of an alpha divergence.
        kinds: by loss, those of cross-entropies first.
        ces: number of cross-entropies.
        sloped: whether there is any loss other than ce and kl.
        slots: a power of two, at least as many as losses.
        adds: add to `grad` instead of overwriting it.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    grad += row * grad_stride
    slot = tl.arange(0, slots)
    value = tl.zeros([slots], tl.float32)
    top_z, log_z = _log_sum(z, width, temperature, block)
    if t is not None:
        t += row * t_stride
        top_t, log_t = _log_sum(t, width, t_temperature, block)

    on_q = 0.0
    on_p = 0.0
    for i in tl.static_range(len(kinds)):
        if kinds[i] == "ce" or kinds[i] == "kl":
            on_q += scales[i]
        if kinds[i] == "kl":
            on_p += scales[i]
        if kinds[i] == "ce":
            own = tl.load(chosen + row * ces + i).to(tl.float32)
            value += tl.where(slot == i, log_z - (own - top_z), 0.0)

    if sloped:
        for start in range(0, width, block):
            at = start + tl.arange(0, block)
            log_q = _log_probs(z, at, width, temperature, top_z, log_z)
            log_p = _log_probs(t, at, width, t_temperature, top_t, log_t)
            for i in tl.static_range(len(kinds)):
                if kinds[i] != "ce" and kinds[i] != "kl":
                    found, slope = _compare(tl.constexpr(kinds[i]), shares[i], log_q, log_p)
                    value += tl.where(slot == i, tl.sum(found, 0), 0.0)
                    on_q -= scales[i] * tl.sum(tl.exp(log_q) * slope, 0)

    for start in range(0, width, block):
        at = start + tl.arange(0, block)
        log_q = _log_probs(z, at, width, temperature, top_z, log_z)
        factor = tl.zeros([block], tl.float32) + on_q
        if t is not None:
            log_p = _log_probs(t, at, width, t_temperature, top_t, log_t)
            p = tl.exp(log_p)
        for i in tl.static_range(len(kinds)):
            if kinds[i] == "kl":
                value += tl.where(slot == i, tl.sum(p * (log_p - log_q), 0), 0.0)
            elif kinds[i] != "ce":
                _, slope = _compare(tl.constexpr(kinds[i]), shares[i], log_q, log_p)
                factor += scales[i] * slope
        found = tl.exp(log_q) * factor
        if t is not None:
            found -= on_p * p
        for i in tl.static_range(ces):
            label = tl.load(labels + row * ces + i)
            found -= tl.where(at == label, scales[i], 0.0)
        found /= temperature
        if adds:
            found += tl.load(grad + at, mask=at < width, other=0.0)
        tl.store(grad + at, found, mask=at < width)

    tl.store(values + row * len(kinds) + slot, value, mask=slot < len(kinds))


@triton.jit
def _log_sum(x, width, temperature, block: tl.constexpr):
    """The largest entry of a row of logits, and the log sum exp less it."""
    top = LOWEST
    total = 0.0
    for start in range(0, width, block):
        at = start + tl.arange(0, block)
        found = tl.load(x + at, mask=at < width, other=float("-inf")).to(tl.float32) / temperature
        new = tl.maximum(top, tl.max(found, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(found - new), 0)
        top = new
    return top, tl.log(total)


@triton.jit
def _log_probs(x, at, width, temperature, top, log_total):
    found = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32) / temperature
    return tl.where(at < width, found - top - log_total, OUTSIDE)


@triton.jit
def _compare(kind: tl.constexpr, share, log_q, log_p):
    """A divergence's terms and its g, by token."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if kind == "reverse_kl":
        slope = log_q - log_p
        found = q * slope
    elif kind == "tvd":
        apart = q - p
        found = 0.5 * tl.abs(apart)
        slope = tl.where(apart > 0, 0.5, tl.where(apart < 0, -0.5, 0.0))
    elif kind == "skew_kl":
        mixture = tl.maximum(share * p + (1 - share) * q, TINY)
        found = p * (log_p - tl.log(mixture))
        slope = (share - 1) * p / mixture
    elif kind == "skew_reverse_kl":
        mixture = tl.maximum(share * q + (1 - share) * p, TINY)
        log_ratio = log_q - tl.log(mixture)
        found = q * log_ratio
        slope = log_ratio - share * q / mixture
    elif kind == "soft_reverse_kl":
        log_inverse_ratio = log_q - log_p
        slope = (
            tl.maximum(log_inverse_ratio, 0.0)
            + tl.log(1 + tl.exp(-tl.abs(log_inverse_ratio)))
            - LOG_2
        )
        found = (p + q) * slope
    elif kind == "alpha" or kind == "hellinger" or kind == "pearson" or kind == "neyman":
        factor = 1.0
        if kind == "hellinger":
            factor = 0.5
        elif kind != "alpha":
            factor = 2.0
        bound = LARGEST / tl.maximum(tl.abs(share), tl.abs(share - 1))
        log_r = tl.minimum(tl.maximum(log_p - log_q, -bound), bound)
        slope = -factor * (tl.exp(share * log_r) - 1) / share
        found = q * slope + factor * p * (tl.exp((share - 1) * log_r) - 1) / (share - 1)
    else:
        tl.static_assert(kind == "jsd")
        mixture = tl.maximum(share * p + (1 - share) * q, TINY)
        log_mixture = tl.log(mixture)
        log_ratio = log_q - log_mixture
        found = share * p * (log_p - log_mixture) + (1 - share) * q * log_ratio
        slope = (1 - share) * log_ratio
    return found, slope
