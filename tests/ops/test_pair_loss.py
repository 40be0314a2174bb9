"""Losses of pairs: values and gradients against dense float64 logits, and what is projected."""

import pytest
import torch

from mmkd.ops import Head, HeadLoss, head_losses, linear_pair_loss, set_logps, token_logps

PAIRS, H, V, KNOWN = 4, 5, 13, 11
LENGTHS = [3, 1, 6, 2, 4, 0, 5, 2]
"""Rows of each sequence: pairs of 7, 1, 11 and 4 rows."""
N = sum(LENGTHS)


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, KNOWN, (N,), generator=g)
    sequences = torch.arange(2 * PAIRS).repeat_interleave(torch.tensor(LENGTHS))
    shuffled = torch.randperm(N, generator=g)
    return (normal(N, H), normal(V, H), normal(V)), targets, sequences[shuffled]


def loss(logps, some):
    """Not linear in the margin, and another one for each pair."""
    factor = torch.arange(1, PAIRS + 1, dtype=logps.dtype)[some]
    chosen, rejected = logps
    return (factor * (0.3 * (chosen - rejected)).sigmoid() + 0.01 * (chosen * rejected)).sum()


def dense(tensors, targets, sequences):
    hidden, weight, bias = (t.double() for t in tensors)
    found = (hidden @ weight.T + bias)[:, :KNOWN].log_softmax(1).gather(1, targets[:, None])[:, 0]
    logps = torch.stack([found[sequences == s].sum() for s in range(2 * PAIRS)]).view(2, PAIRS)
    return loss(logps, slice(None)), logps


@pytest.fixture
def projected(monkeypatch):
    """Numbers of rows that met the head."""
    names = token_logps.__globals__
    rows, project = [], names["project"]
    monkeypatch.setitem(
        names, "project", lambda hidden, *rest: rows.append(len(hidden)) or project(hidden, *rest)
    )
    return rows


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 11, 12])
def test_losses_equal_their_twin_with_gradients(chunk):
    tensors, targets, sequences = inputs()
    got, logps = linear_pair_loss(
        *tensors[:2],
        targets,
        sequences,
        PAIRS,
        loss,
        bias=tensors[2],
        vocab_size=KNOWN,
        chunk_size=chunk,
    )
    want, wanted = dense(tensors, targets, sequences)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(logps, wanted)
    grads = [torch.autograd.grad(3 * x, tensors) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("chunk", "rows"),
    [
        (N, [N]),
        (12, [8, 11, 4]),  # pairs of 7 and 1 together, 11, 4
        (7, [7, 1, 4, 7, 4, 4]),  # a pair of 4 and 7 rows, of which the 4 are projected again
    ],
)
def test_pairs_that_fit_in_a_chunk_are_projected_once(chunk, rows, projected):
    tensors, targets, sequences = inputs()
    total, _ = linear_pair_loss(
        *tensors[:2], targets, sequences, PAIRS, loss, bias=tensors[2], chunk_size=chunk
    )
    total.backward()
    assert projected == rows


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_meets_each_row_once(frozen, projected):
    (hidden, weight, bias), targets, _ = inputs()
    weight, bias = (t.detach().requires_grad_(not frozen) for t in (weight, bias))
    found = token_logps(hidden, weight, targets, bias=bias, chunk_size=6)
    upstream = torch.linspace(-1, 1, N, dtype=torch.float64)
    (got,) = torch.autograd.grad(found, hidden, upstream, retain_graph=True)
    want = (hidden @ weight.T + bias).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, *torch.autograd.grad(want, hidden, upstream))
    (again,) = torch.autograd.grad(found, hidden, upstream)
    assert torch.equal(got, again)
    assert sum(projected) == (N if frozen else 3 * N)


def test_a_frozen_head_makes_long_pairs_cheap(projected):
    (hidden, weight, _), targets, sequences = inputs()
    linear_pair_loss(hidden, weight.detach(), targets, sequences, PAIRS, loss, chunk_size=2)
    assert sum(projected) == N


def test_nothing_is_computed_for_gradients_that_nobody_asks_for(monkeypatch):
    (hidden, weight, _), targets, sequences = inputs()
    want, _ = linear_pair_loss(hidden, weight, targets, sequences, PAIRS, loss)
    products = []
    for function in (head_losses, token_logps):
        monkeypatch.setitem(function.__globals__, "add_product", lambda *_: products.append("head"))
    tokens = token_logps.__globals__["TokenRows"]
    monkeypatch.setattr(tokens, "hidden_gradient", lambda *_: products.append("hidden"))
    with torch.no_grad():
        got, _ = linear_pair_loss(hidden.detach(), weight, targets, sequences, PAIRS, loss)
        token_logps(hidden.detach(), weight, targets)
        head_losses(Head(hidden.detach(), weight), [HeadLoss("ce", targets=targets)])
    assert not products
    assert not got.requires_grad
    torch.testing.assert_close(got, want.detach())


def test_improbable_tokens_keep_their_precision():
    """A probability that float32 rounds to 0."""
    weight = torch.tensor([[0.0], [90.0], [200.0]])
    hidden = torch.tensor([[1.0], [-1.0]])
    found = token_logps(hidden, weight, torch.tensor([0, 2]))
    torch.testing.assert_close(found, torch.tensor([-200.0, -200.0]), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_are_close_to_float64(dtype, error):
    tensors, targets, sequences = inputs(dtype)
    total, logps = linear_pair_loss(
        *tensors[:2],
        targets,
        sequences,
        PAIRS,
        loss,
        bias=tensors[2],
        vocab_size=KNOWN,
        chunk_size=7,
    )
    assert logps.dtype == total.dtype == torch.float32
    want, _ = dense(tensors, targets, sequences)
    torch.testing.assert_close(total.double(), want, rtol=error, atol=0)
    grads = [torch.autograd.grad(x, tensors) for x in (total, want)]
    for got, wanted in zip(*grads, strict=True):
        assert got.dtype == dtype
        assert float((got.double() - wanted).norm() / wanted.double().norm()) < error


def test_no_pairs_are_zero_and_gradients_are_freed():
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.ones(V, H, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    total, logps = linear_pair_loss(hidden, weight, nothing, nothing, 0, loss)
    assert logps.shape == (2, 0)
    total.backward(retain_graph=True)
    assert total.item() == 0
    assert weight.grad.abs().sum() == 0
    with pytest.raises(RuntimeError, match="ran already"):
        total.backward()


def test_shapes_that_do_not_match():
    (hidden, weight, _), targets, sequences = inputs()
    with pytest.raises(ValueError, match=r"targets \[N\], got \[23, 5\] and \[22\]"):
        linear_pair_loss(hidden, weight, targets[1:], sequences, PAIRS, loss)
    with pytest.raises(ValueError, match=r"of at least one pair, got \[22\] and 4"):
        linear_pair_loss(hidden, weight, targets, sequences[1:], PAIRS, loss)
    with pytest.raises(ValueError, match=r"of at least one pair, got \[23\] and 0"):
        linear_pair_loss(hidden, weight, targets, sequences, 0, loss)


def test_a_head_in_another_dtype_gets_gradients_in_its_own():
    (hidden, weight, bias), _, _ = inputs(torch.float32)
    mask = torch.arange(V) % 3 == 0
    wide = [t.detach().double().requires_grad_() for t in (weight, bias)]
    set_logps(hidden, wide[0], mask, bias=wide[1]).sum().backward()
    want = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    set_logps(want[0], want[1], mask, bias=want[2]).sum().backward()
    for got, exact in zip((hidden, *wide), want, strict=True):
        assert got.grad.dtype == got.dtype
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
