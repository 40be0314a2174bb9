"""Loss, margin and entropy of predictions against their definitions."""

import math

import pytest
import torch

from mmkd.ops.token_scores import token_scores

N, H, V = 31, 5, 19


def model(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V + 2, H, generator=g)
    bias = torch.randn(V + 2, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def twin(logits, target):
    """The three numbers of one prediction, from its list of logits."""
    total = math.fsum(map(math.exp, logits))
    p = [math.exp(z) / total for z in logits]
    first, second = sorted(p, reverse=True)[:2]
    return -math.log(p[target]), first - second, -math.fsum(x * math.log(x) for x in p)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scores_are_as_defined(chunk, with_bias):
    hidden, weight, bias, targets = model()
    found = token_scores(
        hidden, weight, targets, bias=bias if with_bias else None, vocab_size=V, chunk_size=chunk
    )
    for row in range(N):
        logits = (weight[:V] @ hidden[row] + (bias[:V] if with_bias else 0)).tolist()
        wanted = twin(logits, int(targets[row]))
        got = [float(x[row]) for x in (found.nll, found.margin, found.entropy)]
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    found = token_scores(hidden, weight, torch.tensor([0, 0]))
    assert found.nll.tolist() == [0.0, 600.0]
    assert found.margin.tolist() == [1.0, 1.0]
    assert found.entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-100)


def test_equal_logits_have_no_margin_and_the_largest_entropy():
    found = token_scores(torch.zeros(1, H), torch.randn(V, H), torch.tensor([3]))
    assert float(found.margin) == 0
    assert float(found.entropy) == pytest.approx(math.log(V))
    assert float(found.nll) == pytest.approx(math.log(V))


def test_no_rows_and_one_token():
    hidden, weight, _, targets = model()
    assert len(token_scores(hidden[:0], weight, targets[:0]).nll) == 0
    with pytest.raises(ValueError, match="two tokens"):
        token_scores(hidden, weight[:1], targets * 0)
