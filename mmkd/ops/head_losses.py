"""Losses on a head's output, all that a batch needs in one pass over its rows.

Of N rows and V tokens only [chunk, V] logits exist at any time. Rows are sorted by the losses that
cover them, rows that none covers never meet the head, and each chunk is projected once, by the
student's head and by the teacher's. Gradients are written down, not recorded: with z the student's
logits over T, q and p the student's and the teacher's distribution, and g = dL/dq,

    dL/dz = q (g - <q, g>)

    ce                q - 1[y]
    kl                q - p                               (g = -p / q)
    reverse_kl        g = log q - log p
    jsd               g = (1 - b) log(q / m),             m = b p + (1 - b) q
    skew_kl           g = -(1 - a) p / m,                 m = a p + (1 - a) q
    skew_reverse_kl   g = log(q / m) - a q / m,           m = a q + (1 - a) p
    tvd               g = -1/2 sign(p - q)

They are taken in the forward pass, while a chunk's logits are there; the backward pass scales them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
CHUNK_BYTES = 2**27
"""Memory for a chunk's logits and what is made of them, all together."""
BUFFERS = 5


@dataclass(frozen=True)
class Head:
    """What a head is applied to.

    Attributes:
        hidden: [N, H], final hidden states.
        weight: [V, H].
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class HeadLoss:
    """One loss and the rows that it covers.

    Attributes:
        kind: `ce` or one of `DIVERGENCES`.
        mask: [N] bool, the rows; None for all.
        scale: factor of its sum over rows in the total.
        targets: [N] int64, the tokens of `ce`.
        temperature: divides the logits of a divergence.
        beta: of jsd.
        alpha: of skew_kl and skew_reverse_kl.
        vocab_size: tokens that get mass; None for all of the head's.
    """

    kind: str
    mask: Tensor | None = None
    scale: float = 1.0
    targets: Tensor | None = None
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    vocab_size: int | None = None

    def scaled(self, scale: float) -> "HeadLoss":
        return replace(self, scale=scale)

    @property
    def settled(self) -> str:
        """The kind, where a setting makes it another one."""
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            return "kl" if self.beta == 0.0 else "reverse_kl"
        if self.alpha == 0.0 and self.kind.startswith("skew_"):
            return self.kind.removeprefix("skew_")
        return self.kind


def head_losses(
    student: Head,
    losses: Sequence[HeadLoss],
    teacher: Head | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of losses over their rows.

    Args:
        student: gets gradients where it asks for them.
        losses: of any kinds, over any rows.
        teacher: of the same N rows; gets no gradient. Not needed by `ce` alone.
        chunk_size: rows projected at once; what fits in `CHUNK_BYTES` if None.

    Returns:
        The sum of scale times loss, differentiable once, and each loss's own sum, [len(losses)],
        without gradient; both in at least float32. No rows give 0 with zero gradients.

    Raises:
        ValueError: unknown kind, a setting out of range, or shapes that do not fit.
    """
    for loss in losses:
        _check(loss, student, teacher)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, it must be at least 1")
    # Autocast would round the float32 reductions and products that are explicit here.
    with torch.autocast(student.hidden.device.type, enabled=False):
        total, sums = _HeadLosses.apply(
            student.hidden, student.weight, student.bias, teacher, tuple(losses), chunk_size
        )
    return total, sums


def _check(loss: HeadLoss, student: Head, teacher: Head | None) -> None:
    rows, size = student.hidden.shape[0], student.weight.shape[0]
    if student.hidden.dim() != 2:
        raise ValueError(f"hidden states must be [N, H], got {list(student.hidden.shape)}")
    if loss.mask is not None and (loss.mask.dtype != torch.bool or loss.mask.shape != (rows,)):
        raise ValueError(
            f"mask must be bool [{rows}], got {loss.mask.dtype} {list(loss.mask.shape)}"
        )
    if loss.kind == "ce":
        if loss.targets is None or loss.targets.shape != (rows,):
            raise ValueError(f"ce needs targets [{rows}]")
        return
    if loss.kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {loss.kind!r}, known: {', '.join(DIVERGENCES)}")
    if loss.temperature <= 0:
        raise ValueError(f"temperature is {loss.temperature}, it must be positive")
    if not 0 <= loss.beta <= 1:
        raise ValueError(f"beta is {loss.beta}, it must be in [0, 1]")
    if not 0 <= loss.alpha < 1:
        raise ValueError(f"alpha is {loss.alpha}, it must be in [0, 1)")
    if teacher is None:
        raise ValueError(f"{loss.kind} needs a teacher")
    if teacher.hidden.shape[0] != rows:
        raise ValueError(f"{rows} student rows but {teacher.hidden.shape[0]} teacher rows")
    smaller = min(size, teacher.weight.shape[0])
    if loss.vocab_size is None and size != teacher.weight.shape[0]:
        raise ValueError(
            f"the heads have {size} (student) and {teacher.weight.shape[0]} (teacher) rows: give "
            "vocab_size, the number of tokens that both share"
        )
    if loss.vocab_size is not None and not 0 < loss.vocab_size <= smaller:
        raise ValueError(f"vocab_size is {loss.vocab_size}, it must be between 1 and {smaller}")


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Logits [C, V] in at least float32; the product itself runs in the hidden states' dtype.

    `out` is memory for them, used where no conversion is needed.
    """
    weight = weight.to(hidden.dtype)
    if out is not None and out.dtype == hidden.dtype:
        logits = torch.mm(hidden, weight.t(), out=out)
    else:
        logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is None:
        return logits
    bias = bias.to(logits.dtype)
    return logits + bias if out is None else logits.add_(bias)


def rows_per_chunk(rows: int, vocabulary: int, chunk_size: int | None, bytes_each: int = 4) -> int:
    """How many rows to project at once; by default what fits in `CHUNK_BYTES`."""
    fitting = CHUNK_BYTES // (BUFFERS * bytes_each * vocabulary)
    return max(1, min(rows, chunk_size or max(16, fitting)))


def _groups(losses: Sequence[HeadLoss], rows: int, device: torch.device) -> Iterator[Any]:
    """Rows that the same losses cover: (numbers of the rows [K], losses with their numbers)."""
    covered = torch.zeros(rows, dtype=torch.long, device=device)
    for number, loss in enumerate(losses):
        covered += (1 << number) * (1 if loss.mask is None else loss.mask.long())
    for code in covered.unique().tolist():
        part = [(i, loss) for i, loss in enumerate(losses) if code >> i & 1]
        if part:
            yield (covered == code).nonzero()[:, 0], part


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Head | None,
        losses: tuple[HeadLoss, ...],
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        width = max(weight.shape[0] if x.vocab_size is None else x.vocab_size for x in losses)
        own = weight[:width].to(hidden.dtype)
        own_bias = None if bias is None else bias[:width]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        sums = hidden.new_zeros(len(losses), dtype=torch.float64)
        memory = _Memory(wide, hidden.device)
        for rows, part in _groups(losses, len(hidden), hidden.device):
            chunk = rows_per_chunk(len(rows), width, chunk_size, wide.itemsize)
            for some in rows.split(chunk):
                h = hidden[some]  # [C, H]
                logits = project(h, own, own_bias, memory("student", len(some), width))
                theirs = None
                if teacher is not None and any(x.kind != "ce" for _, x in part):
                    theirs = _teacher_logits(teacher, some, part, memory)
                grad = _chunk(logits, theirs, some, part, sums, memory)  # [C, width]
                if grad_bias is not None:
                    grad_bias[:width] += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[some] = grad @ own
                if grad_weight is not None and grad.dtype == wide:
                    grad_weight[:width].addmm_(grad.t(), h)
                elif grad_weight is not None:
                    grad_weight[:width] += grad.t() @ h
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        scales = sums.new_tensor([loss.scale for loss in losses])
        total, sums = (scales @ sums).to(wide), sums.to(wide)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        if ctx.grads is None:
            raise RuntimeError("the gradients were taken once and are gone")
        grads = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (*grads, None, None, None)


class _Memory:
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


Part = list[tuple[int, HeadLoss]]


def _teacher_logits(teacher: Head, rows: Tensor, part: Part, memory: _Memory) -> Tensor:
    whole = len(teacher.weight)
    width = max(whole if x.vocab_size is None else x.vocab_size for _, x in part if x.kind != "ce")
    bias = None if teacher.bias is None else teacher.bias.detach()[:width]
    hidden = teacher.hidden.detach()[rows]
    out = memory("teacher", len(rows), width)
    return project(hidden, teacher.weight.detach()[:width], bias, out).to(memory.dtype)


def _chunk(
    logits: Tensor,
    theirs: Tensor | None,
    rows: Tensor,
    part: Part,
    sums: Tensor,
    memory: _Memory,
) -> Tensor:
    """Add the chunk's losses to `sums`; returns the total's gradient by its logits.

    Args:
        logits, theirs: [C, V] and [C, V'] of student and teacher; lost afterwards.
        rows: [C], numbers of the rows.
        part: the losses that cover these rows.
        sums: [losses].
        memory: for what is made on the way.
    """
    whole = logits.shape[1]
    alike: dict[tuple[float, int], Part] = {}
    for number, loss in part:
        temperature = 1.0 if loss.kind == "ce" else loss.temperature
        key = (temperature, loss.vocab_size or whole)
        alike.setdefault(key, []).append((number, loss))
    grad: Tensor | None = None
    for (temperature, width), some in alike.items():
        z = logits[:, :width]
        t = None
        if theirs is not None and any(loss.kind != "ce" for _, loss in some):
            t = theirs[:, :width]
        if temperature != 1 or len(alike) > 1:
            z = z / temperature
            t = None if t is None else t / temperature
        found = _Distributions(z, t, memory).losses(rows, some, sums)
        found = found if temperature == 1 else found.div_(temperature)
        if grad is None and width == whole and len(alike) == 1:
            return found
        grad = torch.zeros_like(logits) if grad is None else grad
        grad[:, :width] += found
    assert grad is not None
    return grad


class _Distributions:
    """Student's and teacher's distribution of a chunk's rows, at one temperature.

    Args:
        z: [C, V], the student's logits.
        t: [C, V], the teacher's, or None; lost afterwards.
        memory: for what is made on the way.
    """

    def __init__(self, z: Tensor, t: Tensor | None, memory: _Memory):
        self.z, self.memory = z, memory
        self.q, self.log_sum = self._softmax(z, "q")
        if t is not None:
            self.p, log_sum = self._softmax(t, "p")
            self.ahead = t.sub_(z)  # log p - log q, but for a number a row
            self.offset = self.log_sum - log_sum  # [C]

    def _softmax(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Probabilities [C, V] and log sum exp [C]."""
        made = torch.softmax(x, -1, out=self.memory(name, *x.shape))
        top = x.argmax(-1, keepdim=True)
        return made, (x.gather(1, top) - made.gather(1, top).log_())[:, 0]

    def losses(self, rows: Tensor, part: Part, sums: Tensor) -> Tensor:
        """Add to `sums`; returns the gradient of the scaled losses, [C, V]."""
        on_q = on_p = 0.0
        slope: Tensor | None = None  # g, summed over losses
        labels: list[tuple[Tensor, float]] = []
        for number, loss in part:
            if loss.kind == "ce":
                assert loss.targets is not None
                chosen = loss.targets[rows, None]
                value = self.log_sum - self.z.gather(1, chosen)[:, 0]
                labels.append((chosen, loss.scale))
                on_q += loss.scale
            elif loss.settled == "kl":
                value = _dot(self.p, self.ahead) + self.offset
                on_q += loss.scale
                on_p += loss.scale
            else:
                value, g = getattr(self, f"_{loss.settled}")(loss)
                g = g.mul_(loss.scale) if loss.scale != 1 else g
                slope = g if slope is None else slope.add_(g)
            sums[number] += value.sum(dtype=torch.float64)
        if slope is not None:
            grad = slope.add_((on_q - _dot(self.q, slope))[:, None]).mul_(self.q)
        else:
            grad = self.q.mul_(on_q) if on_q != 1 else self.q
        if on_p:
            grad.add_(self.p, alpha=-on_p)
        for chosen, scale in labels:
            grad.scatter_add_(1, chosen, torch.full_like(chosen, -scale, dtype=grad.dtype))
        return grad

    # Each returns the loss's value by row, [C], and a fresh g, [C, V].

    def _reverse_kl(self, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        return -_dot(self.q, self.ahead) - self.offset, -self.ahead

    def _jsd(self, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        b = loss.beta
        lead = self._lead(b)
        from_p = _dot(self.p, self.ahead) + self.offset + _dot(self.p, lead)
        value = b * from_p + (1 - b) * _dot(self.q, lead)
        return value, lead.mul_(1 - b)

    def _skew_kl(self, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        a = loss.alpha
        lead = self._lead(a)
        value = _dot(self.p, self.ahead) + self.offset + _dot(self.p, lead)
        return value, (self.p / self._mixture(a)).mul_(a - 1)

    def _skew_reverse_kl(self, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        a = loss.alpha
        lead = self._lead(1 - a)
        value = _dot(self.q, lead)
        return value, lead.sub_((self.q / self._mixture(1 - a)).mul_(a))

    def _tvd(self, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        apart = self.q - self.p
        return 0.5 * apart.abs().sum(1), apart.sign_().mul_(0.5)

    def _mixture(self, share: float) -> Tensor:
        """share p + (1 - share) q, nowhere 0."""
        made = torch.mul(self.p, share).add_(self.q, alpha=1 - share)
        return made.clamp_(min=torch.finfo(made.dtype).tiny)

    def _lead(self, share: float) -> Tensor:
        """log q - log(share p + (1 - share) q), [C, V]."""
        return self._mixture(share).log_().neg_().add_(self.z).sub_(self.log_sum[:, None])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, [C]."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
