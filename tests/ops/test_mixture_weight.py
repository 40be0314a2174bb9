"""The best weight of a mixture of two models: grid searches, known minima, refusals; and what the
weights of `ce` and `kl` mean."""

import math

import pytest
import torch

from mmkd.ops import Head, HeadLoss, head_losses
from mmkd.ops.mixture_weight import TOLERANCE, fit_mixture_weight, mixture_nll
from tests.support.heads import N, V, parts


def drawn(seed, rows=200, spread=3.0):
    """Log-probabilities of true tokens under two models, [rows] float64 each."""
    g = torch.Generator().manual_seed(seed)
    shift = (0.3 * torch.randn(2, 1, generator=g, dtype=torch.float64)).tolist()
    logits = spread * torch.randn(2, rows, generator=g, dtype=torch.float64)
    return torch.nn.functional.logsigmoid(logits + torch.tensor(shift, dtype=torch.float64))


def twin(first, second, weight):
    """The loss by its definition, row by row."""
    rows = zip(first.tolist(), second.tolist(), strict=True)
    mixed = [weight * math.exp(a) + (1 - weight) * math.exp(b) for a, b in rows]
    return -sum(math.log(q) for q in mixed) / len(mixed)


@pytest.mark.parametrize("seed", range(4))
def test_the_weight_equals_that_of_a_grid_search(seed):
    first, second = drawn(seed)
    weight = fit_mixture_weight(first, second)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    mixed = grid[:, None] * first.exp() + (1 - grid)[:, None] * second.exp()  # [A, N]
    losses = -mixed.log().mean(1)
    assert abs(weight - float(grid[losses.argmin()])) <= 5e-5
    assert 0.05 < weight < 0.95
    assert mixture_nll(first, second, weight) <= float(losses.min()) + 1e-15


@pytest.mark.parametrize("weight", [0.0, 1e-3, 0.4, 1.0])
def test_the_loss_equals_its_definition(weight):
    first, second = drawn(7)
    assert mixture_nll(first, second, weight) == pytest.approx(
        twin(first, second, weight), rel=1e-14
    )


def test_the_derivative_is_0_at_the_weight():
    first, second = drawn(1)
    weight = torch.tensor(fit_mixture_weight(first, second), dtype=torch.float64).requires_grad_()
    (-(weight * first.exp() + (1 - weight) * second.exp()).log().mean()).backward()
    assert abs(float(weight.grad)) < 1e-10


def test_models_that_change_places_change_weights():
    first, second = drawn(2)
    forward, backward = fit_mixture_weight(first, second), fit_mixture_weight(second, first)
    assert forward == pytest.approx(1 - backward, abs=2 * TOLERANCE)


def test_float32_gives_nearly_the_same_weight():
    first, second = drawn(3)
    narrow = fit_mixture_weight(first.float(), second.float())
    assert narrow == pytest.approx(fit_mixture_weight(first, second), abs=1e-5)


def test_a_weight_that_is_known():
    # Each model knows some of the tokens; the weight is the share of those that it knows.
    right, wrong = math.log(0.8), math.log(0.2)
    first = torch.tensor([right] * 13 + [wrong] * 7, dtype=torch.float64)
    second = torch.tensor([wrong] * 13 + [right] * 7, dtype=torch.float64)
    # 13 x 0.6 / (0.2 + 0.6 a) = 7 x 0.6 / (0.8 - 0.6 a)
    assert fit_mixture_weight(first, second) == pytest.approx(0.9 / 1.2, abs=1e-11)


def test_a_perfect_model_has_all_of_the_weight():
    _, second = drawn(4)
    perfect = torch.zeros_like(second)
    assert fit_mixture_weight(perfect, second) == 1.0
    assert fit_mixture_weight(second, perfect) == 0.0
    assert mixture_nll(perfect, second, 1.0) == 0.0


def test_tiny_probabilities_do_not_overflow():
    first = torch.tensor([-2000.0, -1.0, -1.0])
    second = torch.tensor([-1.0, -2000.0, -2000.0])
    assert fit_mixture_weight(first, second) == pytest.approx(2 / 3, abs=1e-11)
    assert math.isfinite(mixture_nll(first, second, 2 / 3))


def test_equal_models_and_bad_values_are_refused():
    first, second = drawn(5)
    for args, words in (
        ((first, first.clone()), "every token the same probability"),
        ((first, second[1:]), r"must be \[N\] of both models"),
        ((first[None], second[None]), r"must be \[N\]"),
        ((first[:0], second[:0]), "there are no rows"),
        ((first, second - math.inf), "not finite"),
        ((first * math.nan, second), "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            fit_mixture_weight(*args)
    with pytest.raises(ValueError, match="not finite"):
        mixture_nll(first, second * math.nan, 0.5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_ce_and_kl_are_the_kl_from_labels_mixed_with_the_teacher(weight):
    student, teacher, mask = parts(11)
    targets = torch.arange(N) % V
    losses = [HeadLoss("ce", mask, weight, targets=targets), HeadLoss("kl", mask, 1 - weight)]
    total, _ = head_losses(Head(*student), losses, Head(*teacher))

    def log_probabilities(model):
        return (model[0] @ model[1].t() + model[2]).log_softmax(1)[mask]  # [M, V]

    p = log_probabilities(teacher).exp()
    mixed = weight * torch.nn.functional.one_hot(targets, V)[mask] + (1 - weight) * p
    own = torch.special.entr(mixed).sum() - (1 - weight) * torch.special.entr(p).sum()
    kl = (torch.xlogy(mixed, mixed) - mixed * log_probabilities(student)).sum()
    torch.testing.assert_close(total, (kl + own).to(total.dtype), rtol=1e-10, atol=1e-12)
    for got, exact in zip(
        torch.autograd.grad(total, student), torch.autograd.grad(kl, student), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
