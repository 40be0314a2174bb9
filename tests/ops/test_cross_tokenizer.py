"""Losses between two vocabularies against naive float64 twins: values and gradients."""

import math

import pytest
import torch

from mmkd.objectives import Chunks, ChunkTokens, Signals, Targets, build_objective
from mmkd.objectives.cross_tokenizer import AlmConfig, UldConfig
from mmkd.ops import Head, binary_divergence, linear_uld
from tests.support.heads import N, V, parts

SIZES = [(V, V), (V, V + 9), (V + 9, V)]
KINDS = ("kl", "reverse_kl", "tvd")


def heads(seed, sizes=(V, V)):
    student, teacher, _ = parts(seed, *sizes)
    return student, Head(*student), Head(*teacher)


def distance(student, teacher):
    """Sum of the rows' distances, on dense logits, by autograd."""
    q, p = (torch.softmax(h.hidden @ h.weight.t() + h.bias, -1) for h in (student, teacher))
    size = max(q.shape[1], p.shape[1])
    total = 0.0
    for mine, theirs in zip(q, p.detach(), strict=True):
        ranked = [torch.cat([x, x.new_zeros(size - len(x))]).sort().values for x in (mine, theirs)]
        total = total + sum(abs(a - b) for a, b in zip(*ranked, strict=True))
    return total


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_uld_is_the_distance_of_sorted_distributions(sizes, chunk_size):
    leaves, student, teacher = heads(0, sizes)
    got = linear_uld(student, teacher, chunk_size=chunk_size)
    want = distance(student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    pairs = zip(*(torch.autograd.grad(3 * x, leaves) for x in (got, want)), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def test_uld_does_not_see_the_order_of_tokens():
    _, student, _ = heads(1)
    order = torch.randperm(V)
    other = Head(student.hidden.detach(), student.weight[order], student.bias[order])
    assert linear_uld(student, other).item() == pytest.approx(0, abs=1e-13)


def test_uld_of_one_model_is_nothing():
    leaves, student, _ = heads(2)
    loss = linear_uld(student, Head(*(x.detach() for x in leaves)))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, leaves))


def test_uld_of_two_certain_rows_is_nothing_and_of_certain_and_even_almost_two():
    certain = Head(torch.tensor([[1000.0]]), torch.eye(64)[:, :1])
    even = Head(torch.tensor([[0.0]]), torch.eye(64)[:, :1])
    turned = Head(torch.tensor([[1000.0]]), torch.eye(64)[:, :1].flip(0))
    assert linear_uld(certain, turned).item() == 0
    assert linear_uld(certain, even).item() == pytest.approx(2 * 63 / 64)


def test_uld_keeps_mass_off_the_padding_rows():
    leaves, student, teacher = heads(3, (V + 4, V))
    got = linear_uld(student, teacher, vocab_size=V)
    cut = Head(leaves[0], leaves[1][:V], leaves[2][:V])
    torch.testing.assert_close(got, distance(cut, teacher), rtol=1e-12, atol=0)
    assert not torch.autograd.grad(got, leaves)[1][V:].any()


def test_uld_in_bfloat16_is_close():
    _, student, teacher = heads(4, (V, V + 9))
    exact = linear_uld(student, teacher).item()
    narrow = [
        Head(*(x.detach().bfloat16() for x in (h.hidden, h.weight, h.bias)))
        for h in (student, teacher)
    ]
    found = linear_uld(*narrow)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=2e-2)


def test_uld_of_no_rows_and_of_unequal_ones():
    leaves, student, teacher = heads(5)
    none = Head(student.hidden[:0], student.weight, student.bias)
    loss = linear_uld(none, Head(teacher.hidden[:0], teacher.weight, teacher.bias))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, leaves[1])[0].any()
    with pytest.raises(ValueError, match=f"0 student rows but {N} teacher rows"):
        linear_uld(none, teacher)


def binary(kind, log_p, log_q, temperature):
    """The divergence of two Bernoulli distributions, term by term."""
    p, q = (math.exp(x / temperature - 1e-6) for x in (log_p, log_q))
    if kind == "tvd":
        return 0.5 * (abs(p - q) + abs((1 - p) - (1 - q)))
    if kind == "reverse_kl":
        p, q = q, p
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_divergence_of_likelihoods(kind, temperature):
    log_p = torch.tensor([-1e-3, -0.3, -2.0, -9.0, -4.0], dtype=torch.float64)
    log_q = torch.tensor([-0.5, -1e-3, -2.0, -3.0, -30.0], dtype=torch.float64)
    log_q.requires_grad_()
    got = binary_divergence(log_p, log_q, kind=kind, temperature=temperature)
    pairs = list(zip(log_p.tolist(), log_q.tolist(), strict=True))
    want = [binary(kind, p, q, temperature) for p, q in pairs]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-8, atol=1e-13)
    assert got[2].item() == 0
    (slope,) = torch.autograd.grad(got.sum(), log_q)
    step = 1e-6
    for i, (p, q) in enumerate(pairs):
        if i == 2 and kind == "tvd":
            continue  # a corner
        up, down = (binary(kind, p, q + d, temperature) for d in (step, -step))
        assert slope[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_and_hopeless_chunks_are_finite(kind):
    sure = torch.tensor([0.0, 0.0, -500.0, -500.0])
    mine = torch.tensor([0.0, -500.0, 0.0, -500.0], requires_grad=True)
    for temperature in (1.0, 100.0, math.inf):
        loss = binary_divergence(sure, mine, kind=kind, temperature=temperature)
        assert loss.isfinite().all()
        assert loss[0] == loss[3] == 0
        assert torch.autograd.grad(loss.sum(), mine)[0].isfinite().all()


def limit(kind, a, b):
    """The limit of tau times the divergence, of log-likelihoods, term by term."""
    a, b = a - 1e-6, b - 1e-6
    if kind == "tvd":
        return abs(a - b)
    if kind == "reverse_kl":
        a, b = b, a
    return (a - b) + a * math.log(b / a)


PAIRS = (
    torch.tensor([-1e-3, -0.3, -2.0, -9.0, -4.0, -2.0, 0.0, -300.0], dtype=torch.float64),
    torch.tensor([-0.5, -1e-3, -2.0, -3.0, -30.0, -2.001, -300.0, 0.0], dtype=torch.float64),
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_of_tau_times_the_divergence(kind):
    log_p, log_q = PAIRS[0], PAIRS[1].clone().requires_grad_()
    got = binary_divergence(log_p, log_q, kind=kind)
    pairs = list(zip(log_p.tolist(), log_q.tolist(), strict=True))
    want = torch.tensor([limit(kind, *pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-13)
    assert got[2].item() == 0
    tau = 1e4  # larger ones lose the digits of 1 - p
    there = tau * binary_divergence(
        log_p + tau * 1e-6, log_q + tau * 1e-6, kind=kind, temperature=tau
    )
    inner = [0, 1, 3, 4, 5]  # neither equal nor certain
    torch.testing.assert_close(
        there[inner], binary_divergence(log_p + 1e-6, log_q + 1e-6, kind=kind)[inner],
        rtol=2e-3, atol=0,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(got.sum(), log_q)
    for i, (p, q) in enumerate(pairs):
        if (i == 2 and kind == "tvd") or q == 0:
            continue  # a corner; a step past certainty
        step = 1e-6 * max(1, abs(q))
        up, down = (limit(kind, p, q + d) for d in (step, -step))
        assert slope[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-8)


def test_the_limit_for_a_likely_and_an_unlikely_text():
    log_p, log_q = (torch.tensor([math.log(x)], dtype=torch.float64) for x in (0.6, 0.2))
    assert binary_divergence(log_p, log_q).item() == pytest.approx(0.5124, abs=1e-4)


def test_settings_out_of_range_are_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="unknown kind 'jsd'"):
        binary_divergence(x, x, kind="jsd")
    for temperature in (0, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            binary_divergence(x, x, temperature=temperature)


WIDTHS = 7, 5
CHUNKS = Chunks(
    ChunkTokens(
        torch.tensor([2, 3, 4, 7 + 1, 7 + 2]),
        torch.tensor([3, 1, 4, 1, 5]),
        torch.tensor([0, 0, 1, 2, 2]),
    ),
    ChunkTokens(
        torch.tensor([1, 2, 3, 5 + 3]), torch.tensor([9, 2, 6, 5]), torch.tensor([0, 1, 1, 2])
    ),
)
"""Of two rows: of the first, two tokens against one and one against two."""


def model(seed, width, length, words):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    return Signals(normal(2, length, width), normal(words, width), normal(words))


def logp(signals, row, token=None):
    hidden = signals.hidden.flatten(0, 1)[row]
    found = torch.log_softmax(signals.head_weight @ hidden + signals.head_bias, -1)
    return found if token is None else found[token]


def likelihoods(signals, tokens):
    sums = [0.0] * tokens.count
    for row, token, chunk in zip(*(x.tolist() for x in vars(tokens).values()), strict=True):
        sums[chunk] = sums[chunk] + logp(signals, row, token)
    return sums


@pytest.fixture
def case():
    student, teacher = model(0, 6, WIDTHS[0], 11), model(1, 8, WIDTHS[1], 17)
    beside = Signals(
        torch.zeros(2, WIDTHS[0], 8), teacher.head_weight, teacher.head_bias,
        own_hidden=teacher.hidden,
    )  # fmt: skip
    ids = torch.zeros(2, WIDTHS[0], dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    targets = Targets(ids, mask, mask, ~mask, chunks=CHUNKS)
    return student, teacher, beside, targets


def agree(student, got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    leaves = [student.hidden, student.head_weight, student.head_bias]
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (got, want)), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine, exact, rtol=1e-8, atol=1e-14)


def test_alm_compares_the_likelihoods_of_chunks(case):
    student, teacher, beside, targets = case
    objective = build_objective(AlmConfig(kind="alm", temperature=100.0))
    assert objective.rows(targets).nonzero().tolist() == [[0, 2], [0, 4], [1, 1]]
    want = 0.0
    mine, theirs = likelihoods(student, CHUNKS.student), likelihoods(teacher, CHUNKS.teacher)
    for q, p in zip(mine, theirs, strict=True):
        q, p = (x / 100 - 1e-6 for x in (q, p.detach()))
        no_q, no_p = (torch.log(1 - x.exp()) for x in (q, p))
        want = want + p.exp() * (p - q) + (1 - p.exp()) * (no_p - no_q)
    got = objective(student, beside, targets, 5.0).loss
    agree(student, got, want / 5)


def test_uld_compares_distributions_where_chunks_begin(case):
    student, teacher, beside, targets = case
    objective = build_objective(UldConfig(kind="uld"))
    want = 0.0
    for mine, theirs in [(2, 1), (4, 2), (8, 8)]:
        q, p = logp(student, mine).exp(), logp(teacher, theirs).exp().detach()
        q = torch.cat([q, q.new_zeros(len(p) - len(q))])
        want = want + (q.sort().values - p.sort().values).abs().sum()
    got = objective(student, beside, targets, 5.0).loss
    agree(student, got, want / 5)


@pytest.mark.parametrize(
    "config", [AlmConfig(kind="alm"), AlmConfig(kind="alm", debias="none"), UldConfig(kind="uld")]
)
def test_a_batch_without_chunks_has_no_loss(case, config):
    student, _, beside, targets = case
    none = ChunkTokens(*[torch.zeros(0, dtype=torch.long)] * 3)
    empty = Targets(
        targets.input_ids, targets.attention, targets.response, targets.vision,
        chunks=Chunks(none, none),
    )  # fmt: skip
    objective = build_objective(config)
    assert not objective.rows(empty).any()
    loss = objective(student, beside, empty, 1.0).loss
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, student.hidden)[0].any()
