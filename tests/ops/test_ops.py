"""Divergences and cross-entropy against naive float64 twins: values and gradients."""

import math

import pytest
import torch

from mmkd.ops import (
    DIVERGENCES,
    Head,
    HeadLoss,
    head_losses,
    linear_cross_entropy,
    linear_divergence,
)
from tests.support.divergences import by_definition
from tests.support.heads import N, V, parts


def twin_row(kind, p, q, beta, alpha):
    """The divergence of two probability vectors, term by term, by its definition."""

    def kl(a, b):
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0)

    def mix(share, a, b):
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    def total(term):
        return sum(term(x, y) for x, y in zip(p, q, strict=True))

    return {
        "kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mix(beta, p, q)) + (1 - beta) * kl(q, mix(beta, p, q)),
        "skew_kl": lambda: kl(p, mix(alpha, p, q)),
        "skew_reverse_kl": lambda: kl(q, mix(alpha, q, p)),
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "soft_reverse_kl": lambda: total(lambda x, y: (x + y) * math.log((x + y) / (2 * x))),
        "hellinger": lambda: total(lambda x, y: (math.sqrt(x) - math.sqrt(y)) ** 2),
        "pearson": lambda: total(lambda x, y: y * (x / y - 1) ** 2),
        "neyman": lambda: total(lambda x, y: x * (y / x - 1) ** 2),
        "alpha": lambda: (
            total(lambda x, y: x**alpha * y ** (1 - alpha) - y) / (alpha * (alpha - 1))
        ),
        "tvd": lambda: 0.5 * total(lambda x, y: abs(x - y)),
    }[kind]()


def twin(kind, student, teacher, temperature, beta, alpha, mask, vocab):
    """Mean over kept rows in float64, with autograd over dense logits."""
    (hs, ws, bs), (ht, wt, bt) = student, teacher
    log_q = torch.log_softmax((hs @ ws.t() + bs)[:, :vocab] / temperature, -1)
    log_p = torch.log_softmax((ht @ wt.t() + bt)[:, :vocab] / temperature, -1).detach()
    rows = by_definition(kind, log_p, log_q, beta=beta, alpha=alpha)
    return (rows * mask).sum() / mask.sum().clamp(min=1)


def call(student, teacher, **kwargs):
    return linear_divergence(
        student[0],
        student[1],
        teacher[0],
        teacher[1],
        student_bias=student[2],
        teacher_bias=teacher[2],
        **kwargs,
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_value_equals_the_definition_term_by_term(kind):
    student, teacher, _ = parts(0)
    # At 1, the powers of some p / q of these two would pass their bound.
    temperature = 8.0 if kind in ("pearson", "neyman") else 1.0
    got = call(student, teacher, kind=kind, temperature=temperature, beta=0.3, alpha=0.2)
    p, q = (
        torch.softmax((hidden @ weight.t() + bias) / temperature, -1).tolist()
        for hidden, weight, bias in (teacher, student)
    )
    want = sum(twin_row(kind, a, b, 0.3, 0.2) for a, b in zip(p, q, strict=True)) / N
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradients_equal_the_dense_twin(kind, temperature, chunk_size, padded):
    vs, vt, vocab = (V + 3, V + 8, V) if padded else (V, V, V)
    student, teacher, mask = parts(1, vs, vt)
    kwargs = {"temperature": temperature, "beta": 0.7, "alpha": 0.2}
    got = call(
        student,
        teacher,
        kind=kind,
        mask=mask,
        chunk_size=chunk_size,
        vocab_size=vocab if padded else None,
        **kwargs,
    )
    got_grads = torch.autograd.grad(3 * got, student)
    want = twin(kind, student, teacher, temperature, 0.7, 0.2, mask, vocab)
    want_grads = torch.autograd.grad(3 * want, student)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_float32_stays_close_to_float64(kind):
    student, teacher, mask = parts(2)
    # Squares of p / q magnify the rounding of far logits.
    how = {"kind": kind, "temperature": 4.0 if kind in ("pearson", "neyman") else 1.0}
    want = call(student, teacher, mask=mask, **how)
    want_grads = torch.autograd.grad(want, student)
    single = [t.detach().float().requires_grad_() for t in student]
    got = call(single, [t.float() for t in teacher], mask=mask, **how)
    got_grads = torch.autograd.grad(got, single)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_models_have_no_divergence(kind):
    student, _, _ = parts(3)
    same = [t.detach().float() for t in student]
    got = call([t.clone().requires_grad_() for t in same], same, kind=kind)
    assert abs(got.item()) < 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_kept_row_gives_zero_and_zero_gradients(kind):
    student, teacher, _ = parts(4)
    got = call(student, teacher, kind=kind, mask=torch.zeros(N, dtype=torch.bool))
    grads = torch.autograd.grad(got, student)
    assert got.item() == 0
    assert all(g.abs().max() == 0 for g in grads)


def test_masked_rows_cannot_poison_the_rest():
    student, teacher, mask = parts(5)
    clean = call(student, teacher, kind="kl", mask=mask)
    dirty = [student[0].detach().clone(), *student[1:]]
    dirty[0][~mask] = math.nan
    dirty[0].requires_grad_()
    got = call(dirty, teacher, kind="kl", mask=mask)
    (grad,) = torch.autograd.grad(got, dirty[0])
    assert got.item() == clean.item()
    assert grad[~mask].abs().max() == 0


def test_skew_without_skew_is_kl_and_jsd_ends_are_kl():
    student, teacher, _ = parts(6)
    kl, reverse = (call(student, teacher, kind=k) for k in ("kl", "reverse_kl"))
    assert call(student, teacher, kind="skew_kl", alpha=0.0).item() == kl.item()
    assert call(student, teacher, kind="skew_reverse_kl", alpha=0.0).item() == reverse.item()
    assert call(student, teacher, kind="jsd", beta=0.0).item() == kl.item()
    assert call(student, teacher, kind="jsd", beta=1.0).item() == reverse.item()
    near = call(student, teacher, kind="jsd", beta=1e-6).item() / 1e-6
    assert near == pytest.approx(kl.item(), rel=1e-3)


def test_alpha_has_the_other_divergences_as_cases_and_limits():
    student, teacher, _ = parts(20)

    def value_and_gradients(kind, **settings):
        value = call(student, teacher, kind=kind, **settings)
        return [value, *torch.autograd.grad(value, student)]

    def agree(kind, order, factor, rtol):
        got = value_and_gradients("alpha", alpha=order)
        for a, b in zip(got, value_and_gradients(kind), strict=True):
            torch.testing.assert_close(factor * a, b, rtol=rtol, atol=rtol / 10)

    agree("hellinger", 0.5, 0.5, 1e-12)
    agree("pearson", 2.0, 2.0, 1e-12)
    agree("neyman", -1.0, 2.0, 1e-12)
    for end, kind in ((1.0, "kl"), (0.0, "reverse_kl")):
        agree(kind, end, 1.0, 0)
        for near in (end - 1e-7, end + 1e-7):
            agree(kind, near, 1.0, 1e-5)


def test_jeffreys_is_the_sum_of_both_kl():
    student, teacher, mask = parts(21)
    total, sums = head_losses(Head(*student), [HeadLoss("jeffreys", mask, 0.3)], Head(*teacher))
    both = [HeadLoss(kind, mask, 0.3) for kind in ("kl", "reverse_kl")]
    want, parts_ = head_losses(Head(*student), both, Head(*teacher))
    assert sums.item() == pytest.approx(parts_.sum().item(), rel=1e-14)
    for a, b in zip(
        torch.autograd.grad(total, student), torch.autograd.grad(want, student), strict=True
    ):
        assert a.equal(b)


@pytest.mark.parametrize("kind", ["jeffreys", "hellinger", "jsd", "tvd"])
def test_symmetric_divergences_stay_when_the_models_are_exchanged(kind):
    student, teacher, _ = parts(22)
    there = call(student, teacher, kind=kind).item()
    assert call(teacher, student, kind=kind).item() == pytest.approx(there, rel=1e-12)


@pytest.mark.parametrize("order", [-1.0, 0.5, 2.0, 3.0])
def test_bounded_powers_are_those_of_a_continued_f(order):
    """Far outside of the bounds the loss grows as p and q do, and its gradient is the value's."""
    z = torch.tensor([[30.0, 0.0, -35.0, 1.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[-35.0, 30.0, 2.0, 1.5]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    got = linear_divergence(z, eye, t, eye, kind="alpha", alpha=order)
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(z, -1)
    want = by_definition("alpha", log_p, log_q, beta=0.5, alpha=order).sum()
    assert (log_p - log_q).abs().max() > 20
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    (a,), (b,) = torch.autograd.grad(got, z), torch.autograd.grad(want, z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_extreme_logits_stay_finite(kind):
    student, teacher, _ = parts(7)
    hot = [(student[0].detach() * 300).float().requires_grad_(), *[t.float() for t in student[1:]]]
    got = call(hot, [t.float() * 30 for t in teacher], kind=kind)
    (grad,) = torch.autograd.grad(got, hot[0])
    assert torch.isfinite(got)
    assert torch.isfinite(grad).all()


def test_frozen_head_gets_no_gradient_and_the_teacher_never_does():
    student, teacher, _ = parts(8)
    hidden = student[0]
    weights = [t.clone().requires_grad_() for t in teacher]
    got = linear_divergence(hidden, student[1].detach(), weights[0], weights[1], kind="kl")
    got.backward()
    assert hidden.grad is not None
    assert weights[0].grad is None
    assert weights[1].grad is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "kld"}, "unknown divergence"),
        ({"kind": "kl", "temperature": 0.0}, "temperature"),
        ({"kind": "jsd", "beta": 1.5}, "beta"),
        ({"kind": "skew_kl", "alpha": 1.0}, "alpha"),
        ({"kind": "alpha", "alpha": math.inf}, "alpha is inf, it must be finite"),
        ({"kind": "kl", "vocab_size": V + 1}, "vocab_size"),
        ({"kind": "kl", "mask": torch.ones(N)}, "mask must be bool"),
        ({"kind": "kl", "chunk_size": 0}, "chunk_size"),
    ],
)
def test_wrong_settings_are_named(kwargs, message):
    student, teacher, _ = parts(9)
    with pytest.raises(ValueError, match=message):
        call(student, teacher, **kwargs)


def test_unequal_heads_need_a_shared_vocabulary():
    student, teacher, _ = parts(10, V, V + 2)
    with pytest.raises(ValueError, match="give vocab_size"):
        call(student, teacher, kind="kl")


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_cross_entropy_equals_torch(chunk_size):
    student, _, mask = parts(11)
    hidden, weight, bias = student
    targets = torch.arange(N) % V
    got = linear_cross_entropy(hidden, weight, targets, mask=mask, bias=bias, chunk_size=chunk_size)
    logits = hidden @ weight.t() + bias
    want = torch.nn.functional.cross_entropy(logits[mask], targets[mask])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, student), torch.autograd.grad(want, student), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("padded", [False, True])
def test_many_losses_in_one_pass_equal_their_sum(padded):
    vs, vt, vocab = (V + 3, V + 8, V) if padded else (V, V, None)
    student, teacher, _ = parts(12, vs, vt)
    generator = torch.Generator().manual_seed(3)
    kinds = [("ce", 1.0), *((kind, t) for kind in DIVERGENCES for t in (1.0, 2.0))]
    targets = torch.randint(V, (N,), generator=generator)
    losses = [
        HeadLoss(
            kind,
            torch.rand(N, generator=generator) < 0.5,
            scale=0.3 + number,
            targets=targets if kind == "ce" else None,
            temperature=temperature,
            beta=0.3,
            alpha=0.2,
            vocab_size=None if kind == "ce" else vocab,
        )
        for number, (kind, temperature) in enumerate(kinds)
    ]
    total, sums = head_losses(Head(*student), losses, Head(*teacher), chunk_size=3)
    expected = []
    for loss in losses:
        if loss.kind == "ce":
            logits = (student[0] @ student[1].t() + student[2])[loss.mask]
            expected.append(
                torch.nn.functional.cross_entropy(logits, targets[loss.mask], reduction="sum")
            )
            continue
        mean = twin(loss.kind, student, teacher, loss.temperature, 0.3, 0.2, loss.mask, vocab)
        expected.append(mean * loss.mask.sum())
    torch.testing.assert_close(sums, torch.stack(expected).detach(), rtol=1e-11, atol=1e-13)
    want = sum(loss.scale * value for loss, value in zip(losses, expected, strict=True))
    torch.testing.assert_close(total, want, rtol=1e-11, atol=0)
    for got, exact in zip(
        torch.autograd.grad(total, student), torch.autograd.grad(want, student), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


@pytest.fixture
def projected(monkeypatch):
    """How many rows each projection had."""
    rows = []
    plain = head_losses.__globals__["project"]

    def counted(hidden, *rest):
        rows.append(len(hidden))
        return plain(hidden, *rest)

    monkeypatch.setitem(head_losses.__globals__, "project", counted)
    return rows


def test_rows_are_projected_once(projected):
    student, teacher, mask = parts(13)
    other = mask.roll(1)
    losses = [
        HeadLoss("ce", mask, targets=torch.zeros(N, dtype=torch.long)),
        HeadLoss("kl", mask),
        HeadLoss("jsd", other),
    ]
    head_losses(Head(*student), losses, Head(*teacher))
    assert sum(projected) == 2 * int(
        (mask | other).sum()
    )  # by the student's head and the teacher's
    projected.clear()
    head_losses(Head(*student), losses[:1], Head(*teacher))
    assert sum(projected) == int(mask.sum())


def test_gradients_are_taken_once():
    student, teacher, _ = parts(14)
    total, _ = head_losses(Head(*student), [HeadLoss("kl")], Head(*teacher))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward pass ran already"):
        total.backward()


def test_a_memory_budget_sets_the_chunk(projected, monkeypatch):
    student, teacher, _ = parts(19)
    monkeypatch.setitem(head_losses.__globals__, "BUFFERS", 1)
    whole, _ = head_losses(Head(*student), [HeadLoss("kl")], Head(*teacher))
    assert max(projected) == N
    projected.clear()
    small, _ = head_losses(Head(*student), [HeadLoss("kl")], Head(*teacher), memory=20 * V * 8)
    assert max(projected) == 20
    torch.testing.assert_close(small, whole, rtol=1e-12, atol=0)
