"""Objectives on routers, against values by hand and float64 twins."""

import pytest
import torch

from mmkd.objectives import RouterSignals, Signals, Targets, build_objective, expert_counts
from mmkd.objectives.balance import BalanceConfig, RouterZConfig


def signals_of(*logits, top_k=2):
    return Signals(
        torch.zeros(1, 1, 1),
        torch.zeros(1, 1),
        routers={i: RouterSignals(x, top_k) for i, x in enumerate(logits)},
    )


def targets_of(attention):
    nothing = torch.zeros_like(attention)
    return Targets(attention.long(), attention, nothing, nothing)


def test_balance_of_a_hand_made_router():
    """Four experts; tokens 0-2 of three prefer expert 0, the padding another."""
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]])
    padding = torch.tensor([[0.01, 0.01, 0.97, 0.01]])
    logits = torch.cat([p, padding]).log()[None]  # [1, 4, E]
    targets = targets_of(torch.tensor([[True, True, True, False]]))
    balance = build_objective(BalanceConfig(kind="balance"))
    assert balance.config.weight == 0.01
    # first choices: expert 0 twice, expert 1 once; mean probabilities 0.4 and 1/3
    want = 4 * (0.4 * 2 / 3 + (1 / 3) * (1 / 3))
    once = balance(signals_of(logits), None, targets, 3).loss
    assert float(once) == pytest.approx(want, rel=1e-6)
    # a sum over layers; a half of the global batch counts half
    twice = balance(signals_of(logits, logits), None, targets, 6).loss
    assert float(twice) == pytest.approx(want, rel=1e-6)
    counts = expert_counts(signals_of(logits), targets)
    assert counts[0].tolist() == [2, 2, 2, 0]


def test_balance_is_one_for_equal_use_and_four_for_one_of_four_experts():
    balance = build_objective(BalanceConfig(kind="balance"))
    even = torch.eye(4) * 20
    targets = targets_of(torch.ones(1, 4, dtype=torch.bool))
    assert float(balance(signals_of(even[None]), None, targets, 4).loss) == pytest.approx(1.0)
    one = torch.zeros(1, 4, 4)
    one[..., 2] = 30
    assert float(balance(signals_of(one), None, targets, 4).loss) == pytest.approx(4.0)


def test_router_objectives_equal_their_twins_with_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    targets = targets_of(real)
    p, count = logits.softmax(-1), int(real.sum())
    first = torch.nn.functional.one_hot(logits.argmax(-1), 4).double()
    balance = sum(
        4 * (p[real][:, e].sum() / count) * (first[real][:, e].sum() / count) for e in range(4)
    )
    z = sum(torch.logsumexp(row, -1) ** 2 for row in logits[real]) / count
    for kind, config, want in (
        ("balance", BalanceConfig, balance),
        ("router_z", RouterZConfig, z),
    ):
        got = build_objective(config(kind=kind))(signals_of(logits), None, targets, count).loss
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (got, want)]
        torch.testing.assert_close(*grads)
        assert grads[0][1, 3:].abs().sum() == 0
