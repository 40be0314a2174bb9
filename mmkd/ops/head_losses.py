"""All losses on a head's output for a batch, in one pass over its rows.

For N rows and V tokens, only [chunk, V] logits are in memory at the same time. Rows are grouped by
the losses that cover them, and rows without a loss are not projected. Each chunk is projected once
by the student's head and once by the teacher's. Gradients (`mmkd.ops.distributions`) are computed
in the forward pass, while the logits of a chunk are in memory; the backward pass scales them.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmkd.ops.backends import kernel_for
from mmkd.ops.checks import check
from mmkd.ops.distributions import Part, Workspace, chunk_losses
from mmkd.ops.terms import DIVERGENCES, Head, HeadLoss, SparseRows

CHUNK_BYTES = 112 * 2**20
BUFFERS = 5
"""Blocks of [chunk, V] that are there at one time."""
KERNEL_BUFFERS = 2
"""The same with the Triton kernel, which writes gradients over the student's logits."""


def head_losses(
    student: Head,
    losses: Sequence[HeadLoss],
    teacher: Head | SparseRows | None = None,
    *,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums of losses over their rows.

    Args:
        student: gets gradients where `requires_grad` is set.
        losses: of any kind, over any rows.
        teacher: of the same N rows; gets no gradient. Not needed for `ce`. With stored rows,
            the teacher's full distribution is never built.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.
        backend: "auto" (a Triton kernel on CUDA where it fits and runs, else torch), "torch" or
            "triton". The kernel supports neither float64, stored rows, weights of rows, a part of
            the teacher's tokens, nor `balanced_kl` and `enhanced`.

    Returns:
        The sum of scale times loss, differentiable once, and each loss's own sum, [len(losses)],
        without gradient; both in at least float32. Without rows: 0 with zero gradients.

    Raises:
        ValueError: unknown kind, a setting out of range, shapes that do not match, or a
            backend that does not support the inputs.
        RuntimeError: backend "triton" where the kernel does not run.
    """
    for loss in losses:
        check(loss, student, teacher)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, it must be at least 1")
    kernel = kernel_for(backend, student.hidden, _unfit(student, losses, teacher))
    # Autocast would round the float32 reductions and products that are explicit here.
    with torch.autocast(student.hidden.device.type, enabled=False):
        total, sums = _HeadLosses.apply(
            *differentiable(student.hidden, student.weight, student.bias),
            teacher,
            tuple(losses),
            chunk_size,
            memory,
            kernel,
        )
    return total, sums


def _unfit(
    student: Head, losses: Sequence[HeadLoss], teacher: Head | SparseRows | None
) -> str | None:
    """Why the kernel cannot take these, or None."""
    if student.hidden.dtype == torch.float64:
        return "the kernel does not support torch.float64"
    if isinstance(teacher, SparseRows):
        return "the kernel does not support stored rows"
    for loss in losses:
        if loss.kind not in ("ce", *DIVERGENCES):
            return f"the kernel does not support {loss.kind}"
        if loss.row_weights is not None:
            return "the kernel does not support weights of rows"
        if loss.kind != "ce" and not loss.teacher_part.is_whole:
            return "the kernel does not support a part of the teacher's tokens"
    return None


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Logits [C, V]; the product itself runs in the hidden states' dtype.

    They are in `out` if it is given, and else in at least float32.
    """
    weight = weight.to(hidden.dtype)
    if out is not None and out.dtype == hidden.dtype:
        logits = torch.mm(hidden, weight.t(), out=out)
    elif out is not None:
        logits = out.copy_(hidden @ weight.t())
    else:
        logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is None:
        return logits
    bias = bias.to(logits.dtype)
    return logits + bias if out is None else logits.add_(bias)


def rows_per_chunk(
    rows: int,
    vocabulary: int,
    chunk_size: int | None,
    bytes_each: int = 4 * BUFFERS,
    memory: int = CHUNK_BYTES,
) -> int:
    """How many rows to project at once; by default what fits in `memory` bytes, and 16 at least.

    `bytes_each` are a logit's, with what is made of it.
    """
    fitting = memory // (bytes_each * vocabulary)
    return max(1, min(rows, chunk_size or max(16, fitting)))


def _groups(losses: Sequence[HeadLoss], rows: int, device: torch.device) -> Iterator[Any]:
    """Group rows by the losses that cover them: (indices of the rows [K], losses with indices)."""
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
        teacher: Head | SparseRows | None,
        losses: tuple[HeadLoss, ...],
        chunk_size: int | None,
        memory: int,
        kernel: ModuleType | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        width = max(weight.shape[0] if x.vocab_size is None else x.vocab_size for x in losses)
        own = weight[:width].to(hidden.dtype)
        own_bias = None if bias is None else bias[:width]
        grads = new_gradients(ctx.needs_input_grad, hidden, weight, bias, wide)
        grad_hidden, grad_weight, grad_bias = grads
        sums = hidden.new_zeros(len(losses), dtype=torch.float64)
        # The kernel reads logits in the dtype of the matrix product, and rounds their gradient.
        as_is = kernel is not None and _one_dtype(Head(hidden, weight, bias), teacher)
        blocks = Workspace(hidden.dtype if as_is else wide, hidden.device)
        find = partial(chunk_losses, workspace=blocks) if kernel is None else kernel.chunk_losses
        bytes_each = blocks.dtype.itemsize * (BUFFERS if kernel is None else KERNEL_BUFFERS)
        for rows, part in _groups(losses, len(hidden), hidden.device):
            chunk = rows_per_chunk(len(rows), width, chunk_size, bytes_each, memory)
            for some in rows.split(chunk):
                h = hidden[some]  # [C, H]
                logits = project(h, own, own_bias, blocks("student", len(some), width))
                theirs: Tensor | SparseRows | None = None
                if isinstance(teacher, SparseRows):
                    theirs = teacher
                elif teacher is not None and any(x.kind != "ce" for _, x in part):
                    theirs = _teacher_logits(teacher, some, part, blocks)
                grad = find(logits, theirs, some, part, sums)  # [C, width]
                if grad_bias is not None:
                    grad_bias[:width] += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[some] = grad @ own
                if grad_weight is not None:
                    add_product(grad_weight[:width], grad.t(), h)
        ctx.grads = grads
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        scales = sums.new_tensor([loss.scale for loss in losses])
        total, sums = (scales @ sums).to(wide), sums.to(wide)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return (*scaled_gradients(ctx, grad_outputs[0]), None, None, None, None, None)


HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of hidden states [N, H], weight [V, H] and bias [V]; None where none is needed."""


def differentiable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, detached where autograd is off. The `needs_input_grad` of a function is true
    for parameters there too, and it would compute gradients for nothing."""
    if torch.is_grad_enabled():
        return list(tensors)
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def new_gradients(
    wanted: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> HeadGradients:
    """Zeros for gradients. Those of weight and bias have `dtype`.

    Args:
        wanted: `needs_input_grad` of an autograd function whose first inputs are these three.
    """
    need_hidden, need_weight, need_bias = wanted[:3]
    return (
        torch.zeros_like(hidden) if need_hidden else None,
        torch.zeros_like(weight, dtype=dtype) if need_weight else None,
        torch.zeros_like(bias, dtype=dtype) if need_bias and bias is not None else None,
    )


def add_gradients(
    into: HeadGradients, grad: Tensor, rows: slice, hidden: Tensor, weight: Tensor
) -> None:
    """Add the gradients of a chunk of rows.

    Args:
        into: of `new_gradients`.
        grad: [C, V], gradient of the chunk's logits.
        rows: of the chunk.
        hidden: [N, H].
        weight: [V, H], in the dtype of `hidden`.
    """
    of_hidden, of_weight, of_bias = into
    if of_bias is not None:
        of_bias += grad.sum(0)
    grad = grad.to(hidden.dtype)
    if of_hidden is not None:
        of_hidden[rows] = grad @ weight
    if of_weight is not None:
        add_product(of_weight, grad.t(), hidden[rows])


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `into`, without a tensor for the product if all have one dtype."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b


def in_dtypes_of(grads: HeadGradients, *tensors: Tensor | None) -> list[Tensor | None]:
    """The gradients in the dtypes of their tensors."""
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]


def scaled_gradients(ctx: Any, scale: Tensor) -> list[Tensor | None]:
    """Multiply the gradients that the forward pass stored by the gradient of the loss.

    Raises:
        RuntimeError: the backward pass ran before.
    """
    if ctx.grads is None:
        raise RuntimeError("the backward pass ran already, and its gradients are freed")
    grads = [
        None if grad is None else grad.mul_(scale).to(dtype)
        for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
    ]
    ctx.grads = None
    return grads


def _one_dtype(student: Head, teacher: Head | SparseRows | None) -> bool:
    """Whether all logits have the dtype of the hidden states. A bias is added in float32."""
    heads = [student, teacher] if isinstance(teacher, Head) else [student]
    return all(h.bias is None and h.hidden.dtype == student.hidden.dtype for h in heads)


def _teacher_logits(teacher: Head, rows: Tensor, part: Part, workspace: Workspace) -> Tensor:
    whole = len(teacher.weight)
    width = max(whole if x.vocab_size is None else x.vocab_size for _, x in part if x.kind != "ce")
    bias = None if teacher.bias is None else teacher.bias.detach()[:width]
    hidden = teacher.hidden.detach()[rows]
    out = workspace("teacher", len(rows), width)
    return project(hidden, teacher.weight.detach()[:width], bias, out).to(workspace.dtype)
