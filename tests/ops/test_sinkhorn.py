"""Transport costs between groups of distributions, against plain autograd and assignments."""

import math
from itertools import permutations

import pytest
import torch

from mmkd.ops import Head, HeadLoss, head_losses, linear_sinkhorn
from tests.support.heads import N, V, parts

SIZES = [4, 4, 3, 1, 4, 4, 3]
assert sum(SIZES) == N


def transport(a, b, epsilon, iterations):
    """The dual value for potentials that autograd does not see."""
    n = len(a)
    cost = (a[:, None] - b[None]).abs().sum(-1)  # [n, n]
    f, g = torch.zeros(n, dtype=a.dtype), torch.zeros(n, dtype=a.dtype)
    w = cost.detach()
    for _ in range(iterations):
        to_rows = -epsilon * (((g[None] - w) / epsilon).logsumexp(1) - math.log(n))
        to_columns = -epsilon * (((f[:, None] - w) / epsilon).logsumexp(0) - math.log(n))
        f, g = (f + to_rows) / 2, (g + to_columns) / 2
    plan = ((f[:, None] + g[None] - cost) / epsilon).exp() / n**2
    return f.mean() + g.mean() - epsilon * (plan.sum() - 1)


def naive(student, teacher, sizes, temperature=1.0, epsilon=0.1, iterations=20, width=V):
    q, p = (((h @ w[:width].T + b[:width]) / temperature).softmax(1)
            for h, w, b in (student, teacher))  # fmt: skip
    total = 0
    for x, y in zip(q.split(sizes), p.detach().split(sizes), strict=True):
        across, own, theirs = (transport(a, b, epsilon, iterations)
                               for a, b in ((x, y), (x, x), (y, y)))  # fmt: skip
        total = total + len(x) * (across - own / 2 - theirs / 2)
    return total


def gradients(total, student):
    for t in student:
        t.grad = None
    total.backward()
    return [t.grad.clone() for t in student]


def rows_of(student, rows):
    return [student[0][rows], *student[1:]]


@pytest.mark.parametrize("memory", [1, 10**9])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 2.0, "iterations": 3}, {"epsilon": 0.5, "iterations": 1}]
)
def test_value_and_gradient(settings, memory):
    student, teacher, _ = parts(0)
    found = linear_sinkhorn(Head(*student), Head(*teacher), SIZES, memory=memory, **settings)
    wanted = naive(student, teacher, SIZES, **settings)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    mine = gradients(3 * found, student)
    for a, b in zip(mine, gradients(3 * wanted, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_heads_that_share_some_tokens():
    student, teacher, _ = parts(1, V, V + 4)
    found = linear_sinkhorn(Head(*student), Head(*teacher), SIZES, vocab_size=V - 3)
    wanted = naive(student, teacher, SIZES, width=V - 3)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    mine = gradients(found, student)
    for a, b in zip(mine, gradients(wanted, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("iterations", [1, 20])
def test_equal_models_have_no_loss_and_no_gradient(iterations):
    """Without convergence too."""
    student, _, _ = parts(0)
    same = Head(*(x.detach() for x in student))
    found = linear_sinkhorn(Head(*student), same, SIZES, iterations=iterations, epsilon=0.02)
    assert abs(float(found.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients(found, student))


def test_the_order_of_rows_within_a_group_is_not_seen():
    student, teacher, _ = parts(2)
    order = torch.cat([group.flip(0).roll(1) for group in torch.arange(N).split(SIZES)])
    wanted = linear_sinkhorn(Head(*student), Head(*teacher), SIZES)
    found = linear_sinkhorn(Head(*student), Head(*rows_of(teacher, order)), SIZES)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(gradients(found, student), gradients(wanted, student), strict=True):
        torch.testing.assert_close(a, b)


def test_single_rows_are_twice_the_total_variation():
    student, teacher, _ = parts(3)
    found = linear_sinkhorn(Head(*student), Head(*teacher), [1] * N)
    wanted = 2 * head_losses(Head(*student), [HeadLoss("tvd")], Head(*teacher))[0]
    torch.testing.assert_close(found, wanted)
    for a, b in zip(gradients(found, student), gradients(wanted, student), strict=True):
        torch.testing.assert_close(a, b)


def test_a_small_epsilon_gives_the_cost_of_the_best_assignment():
    student, teacher, _ = parts(4)
    found = linear_sinkhorn(Head(*student), Head(*teacher), SIZES, epsilon=2e-3, iterations=4000)
    q, p = ((h @ w.T + b).softmax(1).detach() for h, w, b in (student, teacher))
    wanted = 0.0
    for x, y in zip(q.split(SIZES), p.split(SIZES), strict=True):
        cost = torch.cdist(x, y, p=1.0)
        rows = range(len(x))
        wanted += min(float(cost[rows, list(to)].sum()) for to in permutations(rows))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-2)


def test_it_is_never_negative():
    for seed in range(5):
        student, teacher, _ = parts(seed)
        found = linear_sinkhorn(Head(*student), Head(*teacher), SIZES, iterations=500)
        assert float(found.detach()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_common_tokens_are_finite(dtype):
    """Where exp(-W / epsilon) is 0 in float32."""
    hidden = 60 * torch.eye(6, 8)
    student = [hidden.to(dtype), torch.eye(8).to(dtype)]
    for t in student:
        t.requires_grad_()
    teacher = Head(hidden.roll(1, 1).flip(0).to(dtype), torch.eye(8).roll(3, 1).to(dtype))
    found = linear_sinkhorn(Head(*student), teacher, [4, 2], epsilon=0.01)
    assert found.dtype == torch.float32
    assert float(found.detach()) > 1
    assert all(g.isfinite().all() for g in gradients(found, student))


def test_without_rows_it_is_zero():
    student, teacher, _ = parts(0)
    nothing = [student[0][:0], *student[1:]]
    found = linear_sinkhorn(Head(*nothing), Head(teacher[0][:0], *teacher[1:]), [])
    assert float(found.detach()) == 0
    found.backward()
    assert not student[1].grad.any()


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ([N - 1], {}, "the three must be equal"),
        ([N, 0], {}, "no group may be empty"),
        ([N], {"epsilon": 0.0}, "must be positive"),
        ([N], {"iterations": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_named(sizes, settings, message):
    student, teacher, _ = parts(0)
    with pytest.raises(ValueError, match=message):
        linear_sinkhorn(Head(*student), Head(*teacher), sizes, **settings)
