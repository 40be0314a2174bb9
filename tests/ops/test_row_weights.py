"""Losses with weights of rows, and the two divergences whose weights depend on the row."""

import math

import pytest
import torch

from mmkd.ops import DIVERGENCES, Head, HeadLoss, head_losses, linear_divergence
from tests.support.divergences import balanced_kl, enhanced, enhanced_target
from tests.support.heads import N, V, parts

TARGETS = torch.arange(N) * 3 % V


def logs(student, teacher, temperature=1.0, of_teacher=None):
    (hs, ws, bs), (ht, wt, bt) = student, teacher
    log_q = torch.log_softmax((hs @ ws.t() + bs)[:, :V] / temperature, -1)
    return torch.log_softmax((ht @ wt.t() + bt)[:, :V] / (of_teacher or temperature), -1), log_q


def gradients(total, student):
    return torch.autograd.grad(total, student)


def assert_equal(got, want, **bounds):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize(("temperature", "of_teacher"), [(1.0, None), (2.0, 0.5)])
@pytest.mark.parametrize(
    ("kind", "settings", "definition"),
    [
        ("balanced_kl", {"kappa": 1.0}, lambda p, q: balanced_kl(p, q, 1.0)),
        ("balanced_kl", {"kappa": -0.3}, lambda p, q: balanced_kl(p, q, -0.3)),
        ("enhanced", {"gamma": 1.0}, lambda p, q: enhanced(p, q, TARGETS, 1.0)),
        ("enhanced", {"gamma": 1.6}, lambda p, q: enhanced(p, q, TARGETS, 1.6)),
        ("enhanced", {"gamma": 0.5}, lambda p, q: enhanced(p, q, TARGETS, 0.5)),
    ],
)
def test_value_and_gradients_equal_the_twin(
    kind, settings, definition, temperature, of_teacher, chunk_size, padded
):
    student, teacher, mask = parts(31, *((V + 3, V + 8) if padded else (V, V)))
    got = linear_divergence(
        student[0],
        student[1],
        teacher[0],
        teacher[1],
        kind=kind,
        temperature=temperature,
        teacher_temperature=of_teacher,
        targets=TARGETS,
        mask=mask,
        student_bias=student[2],
        teacher_bias=teacher[2],
        vocab_size=V if padded else None,
        chunk_size=chunk_size,
        **settings,
    )
    rows = definition(*logs(student, teacher, temperature, of_teacher))
    want = (rows * mask).sum() / mask.sum()
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    assert_equal(gradients(got, student), gradients(want, student), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["balanced_kl", "enhanced"])
def test_float32_stays_close_to_float64(kind):
    student, teacher, mask = parts(32)
    loss = HeadLoss(kind, mask, targets=TARGETS)
    want, _ = head_losses(Head(*student), [loss], Head(*teacher))
    single = [t.detach().float().requires_grad_() for t in student]
    got, _ = head_losses(Head(*single), [loss], Head(*(t.float() for t in teacher)))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(got, single), gradients(want, student), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def run(student, teacher, loss):
    total, sums = head_losses(Head(*student), [loss], Head(*teacher))
    return [sums, *gradients(total, student)]


def test_a_large_kappa_is_jeffreys():
    student, teacher, mask = parts(33)
    got = run(student, teacher, HeadLoss("balanced_kl", mask, kappa=1e12))
    assert_equal(got, run(student, teacher, HeadLoss("jeffreys", mask)), rtol=1e-9, atol=1e-12)


def test_balanced_kl_of_equals_is_zero():
    student, _, _ = parts(34)
    same = [t.detach() for t in student]
    sums, *grads = run(student, same, HeadLoss("balanced_kl"))
    assert sums.item() == pytest.approx(0, abs=1e-12)
    assert max(g.abs().max().item() for g in grads) < 1e-12


def test_gamma_1_has_the_value_and_the_gradient_of_kl():
    student, teacher, mask = parts(35)
    got = run(student, teacher, HeadLoss("enhanced", mask, targets=TARGETS))
    assert_equal(got, run(student, teacher, HeadLoss("kl", mask)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_enhanced_is_zero_at_its_target(gamma):
    _, teacher, _ = parts(36)
    log_p, _ = logs(teacher, teacher)
    target = enhanced_target(log_p.exp(), TARGETS, gamma)
    eye = torch.eye(V, dtype=torch.float64)
    head = Head(target.log().requires_grad_(), eye)
    loss = HeadLoss("enhanced", targets=TARGETS, gamma=gamma)
    total, sums = head_losses(head, [loss], Head(log_p, eye))
    assert sums.item() == pytest.approx(0, abs=1e-11)
    assert torch.autograd.grad(total, [head.hidden])[0].abs().max() < 1e-12


def test_a_probability_of_0_is_no_nan():
    student, teacher, mask = parts(37)
    far = [teacher[0] * 1e4, teacher[1], teacher[2]]
    for kind in ("balanced_kl", "enhanced"):
        sums, *grads = run(student, far, HeadLoss(kind, mask, targets=TARGETS, gamma=1.5))
        assert sums.isfinite().all()
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", ["ce", *DIVERGENCES, "balanced_kl", "enhanced"])
@pytest.mark.parametrize("part", [{}, {"top_k": 5}], ids=["whole", "part"])
def test_weights_of_rows_are_factors_of_their_losses(kind, part):
    student, teacher, mask = parts(38)
    part = {} if kind == "ce" else part
    weights = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = HeadLoss(kind, mask, 0.7, weights, TARGETS, **part)
    got = run(student, teacher, loss)
    want = [torch.zeros_like(x) for x in got]
    for n in mask.nonzero()[:, 0].tolist():
        alone = torch.zeros_like(mask).index_fill(0, torch.tensor([n]), True)
        row = run(student, teacher, HeadLoss(kind, alone, 0.7, targets=TARGETS, **part))
        want = [total + weights[n] * x for total, x in zip(want, row, strict=True)]
    assert_equal(got, want, rtol=1e-9, atol=1e-11)


def test_weights_of_1_change_nothing():
    student, teacher, mask = parts(39)
    for kind in ("ce", "kl", "reverse_kl", "enhanced"):
        ones = HeadLoss(kind, mask, row_weights=torch.ones(N, dtype=torch.float64), targets=TARGETS)
        plain = HeadLoss(kind, mask, targets=TARGETS)
        assert_equal(run(student, teacher, ones), run(student, teacher, plain), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "balanced_kl", "kappa": 0.0}, "kappa is 0.0, it must not be 0"),
        ({"kind": "balanced_kl", "kappa": math.nan}, "kappa is nan, it must not be 0"),
        ({"kind": "enhanced"}, rf"enhanced needs targets \[{N}\]"),
        ({"kind": "enhanced", "targets": TARGETS, "gamma": 0.0}, "gamma is 0.0, it must be"),
        ({"kind": "kl", "row_weights": torch.ones(N + 1)}, r"row_weights must be floating point"),
        ({"kind": "kl", "row_weights": torch.ones(N).long()}, r"got torch.int64"),
    ],
)
def test_settings_out_of_range(settings, message):
    student, teacher, _ = parts(40)
    with pytest.raises(ValueError, match=message):
        head_losses(Head(*student), [HeadLoss(**settings)], Head(*teacher))
