"""Divergences against a teacher's stored rows, and their naive float64 twins."""

import pytest
import torch

from mmkd.ops import DIVERGENCES, Head, HeadLoss, SparseRows, head_losses
from tests.support.divergences import by_definition
from tests.support.heads import N, V, parts


def stored(teacher, vocab, count, seed=0):
    """A teacher's rows by their likeliest tokens, in another order than the batch's."""
    log_p = torch.log_softmax((teacher[0] @ teacher[1].t() + teacher[2])[:, :vocab], -1)
    log_probs, ids = log_p.topk(count)
    rest = log_p.exp().scatter(1, ids, 0).sum(1).log()
    at = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    back = at.argsort()
    return SparseRows(ids[back], log_probs[back], rest[back], at)


def twin_cells(kind, student, teacher, ids, mask, vocab):
    """Sum over rows in float64: both distributions on the stored tokens and one cell for the
    rest, by autograd."""
    q = torch.softmax((student[0] @ student[1].t() + student[2])[:, :vocab], -1)
    p = torch.softmax((teacher[0] @ teacher[1].t() + teacher[2])[:, :vocab], -1)

    def cells(x):
        return torch.cat([x.gather(1, ids), x.scatter(1, ids, 0).sum(1, keepdim=True)], 1)

    rows = by_definition(kind, cells(p).log(), cells(q).log(), beta=0.3, alpha=0.2)
    return (rows * mask).sum()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("padded", [False, True])
def test_stored_rows_equal_their_twin(kind, padded):
    vs, vt, vocab = (V + 3, V + 8, V) if padded else (V, V, None)
    student, teacher, mask = parts(15, vs, vt)
    targets = torch.arange(N) % V
    rows = stored(teacher, vocab, 5)
    losses = [
        HeadLoss(kind, mask, 0.7, beta=0.3, alpha=0.2, vocab_size=vocab),
        HeadLoss("ce", mask.roll(2), 1.3, targets=targets, vocab_size=vocab),
    ]
    total, sums = head_losses(Head(*student), losses, rows, chunk_size=4)
    divergence = twin_cells(kind, student, teacher, rows.ids[rows.at], mask, vocab)
    logits = (student[0] @ student[1].t() + student[2])[:, :vocab][mask.roll(2)]
    labels = targets[mask.roll(2)]
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    want = 0.7 * divergence + 1.3 * ce
    torch.testing.assert_close(sums, torch.stack([divergence, ce]).detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(total, want, rtol=1e-9, atol=0)
    for got, exact in zip(
        torch.autograd.grad(total, student), torch.autograd.grad(want, student), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_all_tokens_stored_are_the_whole_divergence(kind):
    student, teacher, mask = parts(16)
    rows = stored(teacher, None, V)
    got, _ = head_losses(Head(*student), [HeadLoss(kind, mask)], rows)
    want, _ = head_losses(Head(*student), [HeadLoss(kind, mask)], Head(*teacher))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, student), torch.autograd.grad(want, student), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_fewer_tokens_never_say_more(kind):
    """Joining tokens to one cell never raises an f-divergence (data processing inequality)."""
    student, teacher, _ = parts(17)
    loss = HeadLoss(kind)
    values = [
        head_losses(Head(*student), [loss], stored(teacher, None, k))[1].item()
        for k in (1, 3, 10, V)
    ]
    assert values == sorted(values)
    (whole,) = head_losses(Head(*student), [loss], Head(*teacher))[1].tolist()
    assert values[-1] == pytest.approx(whole)


def test_what_is_not_stored_is_named():
    student, teacher, mask = parts(18)
    rows = stored(teacher, None, 3)
    missing = SparseRows(rows.ids, rows.log_probs, rows.log_rest, rows.at.masked_fill(mask, -1))
    with pytest.raises(ValueError, match=f"{int(mask.sum())} rows of kl are not stored"):
        head_losses(Head(*student), [HeadLoss("kl")], missing)
    with pytest.raises(ValueError, match="temperature 1, the loss asks for 2"):
        head_losses(Head(*student), [HeadLoss("kl", temperature=2)], rows)
