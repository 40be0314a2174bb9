"""Divergences of rows against a naive float64 computation."""

import pytest
import torch

from mmkd.ops import Head, row_kl
from tests.support.heads import N, V, parts


def naive(student, teacher, size):
    z, t = (h @ w[:size].T + b[:size] for h, w, b in (student, teacher))
    q, p = z.softmax(1), t.softmax(1)
    return (p * (p.log() - q.log())).sum(1), p.argmax(1)


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize(("vs", "vt", "size"), [(V, V, None), (V, V + 4, V - 3)])
def test_divergence_and_most_likely_token(chunk, vs, vt, size):
    student, teacher, _ = parts(0, vs, vt)
    found, best = row_kl(Head(*student), Head(*teacher), vocab_size=size, chunk_size=chunk)
    value, token = naive(student, teacher, size or V)
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-14)
    assert torch.equal(best, token)
    assert not found.requires_grad
    small = [[x.detach().float() for x in side] for side in (student, teacher)]
    found, best = row_kl(*(Head(*side) for side in small), vocab_size=size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(best, token)


def test_it_is_zero_at_equal_models_and_without_rows():
    student, _, _ = parts(0)
    found, _ = row_kl(Head(*student), Head(*student))
    assert torch.equal(found, torch.zeros(N, dtype=torch.float64))
    empty = Head(student[0][:0], *student[1:])
    assert [len(x) for x in row_kl(empty, empty)] == [0, 0]


def test_heads_of_different_sizes_need_the_shared_vocabulary():
    student, teacher, _ = parts(0, V, V + 1)
    with pytest.raises(ValueError, match="give vocab_size"):
        row_kl(Head(*student), Head(*teacher))
