"""Log-probabilities of sets of tokens against a naive float64 twin: values and gradients."""

import math

import pytest
import torch

from mmkd.ops import set_logps, token_logps
from tests.support.heads import N, V, parts


def case(seed=0, vocabulary=V, share=0.4):
    student, _, _ = parts(seed, vocabulary)
    mask = torch.rand(V, generator=torch.Generator().manual_seed(seed)) < share
    return student, mask


def dense(hidden, weight, bias, mask):
    """Row by row: the sum of the probabilities of the tokens in the set."""
    found = []
    for row in hidden:
        p = torch.softmax(weight @ row + (0 if bias is None else bias), -1)
        found.append(sum(p[i] for i in mask.nonzero()[:, 0].tolist()).log())
    return torch.stack(found)


def agree(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    factors = torch.linspace(-1, 2, len(got), dtype=got.dtype)
    pairs = zip(*(torch.autograd.grad(x @ factors, leaves) for x in (got, want)), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients_equal_the_twin(chunk_size, biased):
    (hidden, weight, bias), mask = case()
    bias = bias if biased else None
    got = set_logps(hidden, weight, mask, bias=bias, chunk_size=chunk_size)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    agree(got, dense(hidden, weight, bias, mask), leaves)


def test_padding_rows_are_in_no_set_and_may_get_no_mass():
    (hidden, weight, bias), mask = case(1, V + 9)
    got = set_logps(hidden, weight, mask, bias=bias)
    padded = torch.nn.functional.pad(mask, (0, 9))
    agree(got, dense(hidden, weight, bias, padded), [hidden, weight, bias])
    got = set_logps(hidden, weight, mask, bias=bias, vocab_size=V)
    agree(got, dense(hidden, weight[:V], bias[:V], mask), [hidden, weight, bias])


def test_a_set_of_one_token_is_token_logps():
    (hidden, weight, bias), _ = case(2)
    one = torch.zeros(V, dtype=torch.bool)
    one[7] = True
    wanted = token_logps(hidden, weight, torch.full((N,), 7), bias=bias)
    agree(set_logps(hidden, weight, one, bias=bias), wanted, [hidden, weight, bias])


def test_all_tokens_are_certain_and_none_are_impossible():
    (hidden, weight, bias), mask = case(3)
    got = set_logps(hidden, weight, torch.ones_like(mask), bias=bias)
    assert not got.any()
    assert all(not g.any() for g in torch.autograd.grad(got.sum(), [hidden, weight, bias]))
    assert (set_logps(hidden, weight, torch.zeros_like(mask), bias=bias) == -math.inf).all()


def test_nearly_certain_and_nearly_impossible_sets_keep_their_precision():
    """In float32, a logit 40 above or below the other one: a mass of 1 - 4e-18, or 4e-18."""
    hidden = torch.tensor([[40.0], [-40.0], [1000.0], [-1000.0]], requires_grad=True)
    found = set_logps(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([True, False]))
    assert found.tolist() == pytest.approx([-math.exp(-40), -40, 0, -1000], rel=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), hidden)
    assert slope[:, 0].tolist() == pytest.approx([math.exp(-40), 1, 0, 1], rel=1e-6)


def test_bfloat16_is_close_and_at_least_float32():
    (hidden, weight, bias), mask = case(4)
    narrow = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    found = set_logps(*narrow[:2], mask, bias=narrow[2])
    assert found.dtype == torch.float32
    exact = set_logps(hidden, weight, mask, bias=bias).detach().float()
    torch.testing.assert_close(found, exact, rtol=5e-2, atol=5e-2)


def test_no_rows_have_no_gradient():
    (hidden, weight, bias), mask = case(5)
    found = set_logps(hidden[:0], weight, mask, bias=bias)
    assert found.shape == (0,)
    assert not torch.autograd.grad(found.sum(), weight)[0].any()


def test_shapes_that_do_not_match_are_refused():
    (hidden, weight, _), mask = case(6)
    with pytest.raises(ValueError, match=r"mask at most \[30\], got \[23, 6\] and \[37\]"):
        set_logps(hidden, weight, mask, vocab_size=30)
    with pytest.raises(ValueError, match=r"hidden must be \[N, H\]"):
        set_logps(hidden[None], weight, mask)
