"""Divergence and most likely token of a teacher at each row, without logits for all rows.

KL(p_i || q_i) = sum_v p_i[v] (log p_i[v] - log q_i[v])        argmax_v p_i[v]
"""

import torch
from torch import Tensor

from mmkd.ops.checks import check
from mmkd.ops.head_losses import CHUNK_BYTES, project, rows_per_chunk
from mmkd.ops.terms import Head, HeadLoss
from mmkd.ops.token_logps import chunks_of, wide


@torch.no_grad()
def row_kl(
    student: Head,
    teacher: Head,
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """KL divergence of each row at temperature 1, and the teacher's most likely token.

    Unlike in `head_losses`, the result is a value per row, and there are no gradients.

    Args:
        student: [N, H] hidden states, and the head.
        teacher: of the same N rows.
        vocab_size: later rows of both heads get probability 0; None if the heads have equal sizes.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        The divergences, [N] in at least float32, and the tokens, [N] int64.

    Raises:
        ValueError: shapes that do not match.
    """
    check(HeadLoss("kl", vocab_size=vocab_size), student, teacher)
    count, width = len(student.hidden), vocab_size or len(student.weight)
    found = student.hidden.new_empty(count, dtype=wide(student.hidden))
    best = torch.empty(count, dtype=torch.long, device=student.hidden.device)
    with torch.autocast(student.hidden.device.type, enabled=False):
        for rows in chunks_of(count, rows_per_chunk(count, width, chunk_size, memory=memory)):
            log_q, log_p = (_log_probs(head, rows, width) for head in (student, teacher))  # [C, V]
            best[rows] = log_p.argmax(1)
            found[rows] = (log_p.exp() * (log_p - log_q)).sum(1)
    return found, best


def _log_probs(head: Head, rows: slice, width: int) -> Tensor:
    bias = None if head.bias is None else head.bias[:width]
    return project(head.hidden[rows], head.weight[:width], bias).log_softmax(1)
