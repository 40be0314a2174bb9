"""A part of a teacher's distributions: the most likely tokens, and one cell for all others.

The tokens are chosen by the probabilities at temperature 1: the `top_k` most likely ones, or the
fewest whose total probability reaches `top_p` (as in FIRST, arXiv 2408.12168, section 3, and in the
spirit of DAC-KL, arXiv 2407.10068, without its network). Then `rest` decides about the others:

    cell   they are one more entry of both distributions, with their total probability
    drop   both distributions are conditioned on the chosen tokens

A divergence with `cell` is at most the one over all tokens, because joining tokens never increases
an f-divergence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.ops.terms import SparseRows, TeacherPart

LEAST_LOG = -80.0
"""Smallest log-probability of a cell. Its probability may be 0."""

FIRST_TOKENS = 64
"""Tokens that are sorted before more are needed for `top_p`."""


@dataclass(frozen=True)
class Cells:
    """Some tokens of each row, and the set of all others.

    Attributes:
        ids: [C, k] int64, tokens in order of decreasing probability.
        log_p: [C, k + 1], log-probabilities of the teacher; the last is that of all other tokens.
        kept: [C, k + 1] bool, the cells that are compared. Tokens that are not kept belong to the
            last cell.
    """

    ids: Tensor
    log_p: Tensor
    kept: Tensor


def cells_of_stored(stored: SparseRows, rows: Tensor, part: TeacherPart) -> Cells:
    """The cells of stored rows.

    Args:
        stored: rows at temperature 1.
        rows: [C], indices of rows of the batch.
        part: with a temperature of 1, or without the rest.
    """
    at = stored.at[rows]
    logs, order = stored.log_probs[at].sort(dim=1, descending=True, stable=True)
    ids = stored.ids[at].gather(1, order)
    chosen = _chosen(logs, part)
    folded = logs.masked_fill(chosen, -torch.inf)
    rest = torch.cat([stored.log_rest[at, None], folded], 1).logsumexp(1, keepdim=True)
    return _cells(ids, logs / part.temperature, rest, chosen, part)


def cells_of_logits(logits: Tensor, part: TeacherPart) -> Cells:
    """The cells of logits [C, V], which are not divided by a temperature yet."""
    values, ids = _sorted(logits, part)
    chosen = _chosen(values - logits.logsumexp(1, keepdim=True), part)
    scaled = logits / part.temperature  # [C, V]
    total = scaled.logsumexp(1, keepdim=True)
    gone = torch.zeros_like(scaled, dtype=torch.bool).scatter_(1, ids, chosen)
    rest = scaled.masked_fill_(gone, -torch.inf).logsumexp(1, keepdim=True)
    return _cells(ids, values / part.temperature - total, rest - total, chosen, part)


def _cells(ids: Tensor, logs: Tensor, rest: Tensor, chosen: Tensor, part: TeacherPart) -> Cells:
    exists = rest > -torch.inf if part.rest == "cell" else torch.zeros_like(rest, dtype=torch.bool)
    log_p = torch.cat([logs, rest], 1).clamp(min=LEAST_LOG)
    return Cells(ids, log_p, torch.cat([chosen, exists], 1))


def _chosen(log_p: Tensor, part: TeacherPart) -> Tensor:
    """Which of sorted tokens belong to the part, [C, k], from log-probabilities at temperature
    1."""
    rank = torch.arange(log_p.shape[1], device=log_p.device)
    chosen = (rank < (part.top_k or len(rank))).expand_as(log_p)
    if part.top_p is not None:
        before = log_p.exp().cumsum(1).roll(1, 1)
        before[:, :1] = 0
        chosen = chosen & (before < part.top_p)
    return chosen


def _sorted(logits: Tensor, part: TeacherPart) -> tuple[Tensor, Tensor]:
    """The largest logits in order, as many as the part needs, [C, k], and their tokens."""
    whole = logits.shape[1]
    most = min(whole, part.top_k or whole)
    if part.top_p is None:
        return logits.topk(most, 1)
    log_sum = logits.logsumexp(1, keepdim=True)
    count = min(most, FIRST_TOKENS)
    while True:
        values, ids = logits.topk(count, 1)
        covered = (values - log_sum).exp().sum(1)
        if count == most or bool((covered >= part.top_p).all()):
            return values, ids
        count = min(most, 8 * count)
