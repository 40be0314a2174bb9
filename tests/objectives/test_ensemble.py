"""Several teachers with weights by record and token, against float64 twins."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmkd.objectives import Signals, build_objective, score
from mmkd.objectives.divergence_settings import DivergenceConfig, JsdConfig
from mmkd.objectives.ensemble import Ensemble, Member
from tests.support.relating import LAYOUT, TARGETS, B, T, normal

V, SHARED = 12, 11  # the last token is padding of the heads
IDS = torch.randint(SHARED, (B, T), generator=torch.Generator().manual_seed(4))
SOURCES = torch.tensor([[0] * T, [1] * T, [2] * T])
WHOLE = replace(TARGETS, input_ids=IDS, sources=SOURCES)
SAME = (Member("a", 1.5), Member("b", 0.5))
ROUTED = (Member("a", 1.5, frozenset({0, 1})), Member("b", 0.5, frozenset({1, 2})))
APART = (Member("a", 2.0, frozenset({0})), Member("b", 0.5, frozenset({1, 2})))


def signals(seed, width):
    return Signals(normal(B, T, width, seed=seed), normal(V, width, seed=seed + 50))


def teachers(*, equal=False):
    made = {"a": signals(1, 4), "b": signals(1 if equal else 2, 4 if equal else 6)}
    return {n: replace(s.detached(), hidden=s.hidden.detach()) for n, s in made.items()}


def copies(ensemble, config):
    objective = build_objective(config, shared_vocabulary=SHARED)
    return [objective.for_teacher(m.name, m.weight, m.sources, ensemble) for m in ensemble.members]


def scored(objectives, theirs, targets=WHOLE, counts=None):
    student = signals(0, 5)
    counts = counts or {o.name: float(o.counted_rows(targets).sum()) for o in objectives}
    loss, said = score(objectives, student, theirs, targets, counts)
    (gradient,) = torch.autograd.grad(loss, student.hidden)
    return loss, gradient, said


def log_probs(model, b, t):
    return (model.head_weight[:SHARED] @ model.hidden[b, t]).log_softmax(0)


def weights_twin(ensemble, theirs, b, t):
    """v by name of the teacher, for the teachers that cover the record."""
    covering = [m for m in ensemble.members if m.sources is None or b in m.sources]
    last = t + 1 == T or LAYOUT[b][t + 1] not in "pr"
    score = {m.name: m.weight for m in covering}
    if ensemble.kappa is not None and not last:
        for m in covering:
            ce = cross_entropy(log_probs(theirs[m.name], b, t)[None], IDS[b, t + 1][None])
            score[m.name] *= math.exp(-ce.item() / ensemble.kappa)
    total = 1.0 if ensemble.normalize else sum(m.weight for m in covering)
    return {name: total * x / sum(score.values()) for name, x in score.items()}


def in_region(region, b, t):
    if region == "all":
        return LAYOUT[b][t] != "."
    if region == "vision":
        return LAYOUT[b][t] == "v"
    return t + 1 < T and LAYOUT[b][t + 1] == "r"


def ensemble_twin(ensemble, theirs, region, divergence):
    """By loops over rows and teachers."""
    student = signals(0, 5)
    rows = [(b, t) for b in range(B) for t in range(T) if in_region(region, b, t)]

    def count(members):
        every = any(m.sources is None for m in members)
        seen = set().union(*(m.sources or () for m in members))
        return sum(every or b in seen for b, _ in rows)

    total = 0.0
    for b, t in rows:
        q = log_probs(student, b, t)
        for name, v in weights_twin(ensemble, theirs, b, t).items():
            own = [m for m in ensemble.members if ensemble.normalize or m.name == name]
            total = total + v * divergence(log_probs(theirs[name], b, t), q) / count(own)
    (gradient,) = torch.autograd.grad(total, student.hidden)
    return total, gradient


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def jsd(p, q):
    mixed = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, mixed) + kl(q, mixed)) / 2


@pytest.mark.parametrize("members", [SAME, ROUTED], ids=["same", "routed"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kappa", [None, 0.7])
@pytest.mark.parametrize("region", ["response", "vision", "all"])
def test_losses_equal_their_twins(members, normalize, kappa, region):
    ensemble, theirs = Ensemble(members, normalize, kappa), teachers()
    for config, divergence in (
        (DivergenceConfig(kind="kl", region=region), kl),
        (JsdConfig(kind="jsd", region=region), jsd),
    ):
        loss, gradient, said = scored(copies(ensemble, config), theirs)
        want, wanted = ensemble_twin(ensemble, theirs, region, divergence)
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
        named = {f"{config.kind}.{m.name}": m.weight for m in members}
        parts = sum(weight * said[name] for name, weight in named.items())
        torch.testing.assert_close(loss.detach(), parts)


@pytest.mark.parametrize("members", [SAME, ROUTED], ids=["same", "routed"])
@pytest.mark.parametrize("kappa", [None, 0.7])
def test_normalized_teachers_are_one_teacher_of_their_mean_distribution(members, kappa):
    """The gradients are equal, and the losses differ by a constant."""
    ensemble, theirs, student = Ensemble(members, True, kappa), teachers(), signals(0, 5)
    _, gradient, _ = scored(copies(ensemble, DivergenceConfig(kind="kl")), theirs)
    terms = []
    for b, t in ((b, t) for b in range(B) for t in range(T) if in_region("response", b, t)):
        weights = weights_twin(ensemble, theirs, b, t)
        assert sum(weights.values()) == pytest.approx(1)
        mean = sum(v * log_probs(theirs[name], b, t).exp() for name, v in weights.items())
        terms.append(kl(mean.log(), log_probs(student, b, t)))
    (wanted,) = torch.autograd.grad(sum(terms) / len(terms), student.hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_large_kappa_gives_the_static_weights(normalize):
    config = DivergenceConfig(kind="kl")
    found = [
        scored(copies(Ensemble(ROUTED, normalize, kappa), config), teachers())
        for kappa in (None, 1e6, 0.1)
    ]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
    assert (found[0][1] - found[2][1]).abs().max() > 1e-2


@pytest.mark.parametrize("kappa", [None, 0.7])
@pytest.mark.parametrize("members", [SAME, ROUTED, APART], ids=["same", "routed", "apart"])
def test_equal_teachers_are_one_teacher(members, kappa):
    """Of weight 1, whatever records each covers, or of the sum of their weights."""
    config, theirs = DivergenceConfig(kind="kl"), teachers(equal=True)
    alone = build_objective(config, shared_vocabulary=SHARED)
    want = scored([alone], {"a": theirs["a"]})
    got = scored(copies(Ensemble(members, True, kappa), config), theirs)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-10, atol=1e-13)
    if members is SAME:
        got = scored(copies(Ensemble(members, False, kappa), config), theirs)
        torch.testing.assert_close(got[0], 2 * want[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kappa", [None, 0.7])
def test_micro_batches_add_up_and_teachers_may_be_silent(kappa):
    """Teacher a covers no record of the last micro-batch, and b none of the first one."""
    objectives = copies(Ensemble(APART, True, kappa), DivergenceConfig(kind="kl"))
    theirs, student = teachers(), signals(0, 5)
    loss, gradient, _ = scored(objectives, theirs)
    counts = {o.name: float(o.counted_rows(WHOLE).sum()) for o in objectives}
    total = 0.0
    for part, asked in ((slice(0, 1), "a"), (slice(1, 3), "b")):
        targets = replace(
            WHOLE,
            **{n: x[part] for n, x in vars(WHOLE).items() if isinstance(x, torch.Tensor)},
        )
        mine, other = (replace(s, hidden=s.hidden[part]) for s in (student, theirs[asked]))
        total = total + score(objectives, mine, {asked: other}, targets, counts)[0]
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(torch.autograd.grad(total, student.hidden)[0], gradient)


def test_weights_by_token_prefer_the_teacher_that_predicts_it():
    """In a region of text, and nowhere else."""
    ensemble = Ensemble(SAME, normalize=True, kappa=1.0)
    logps = {"a": torch.zeros(B, T), "b": torch.full((B, T), -1.0)}
    found = ensemble.row_weights(WHOLE, logps)
    shares = 1.5 * found["a"], 0.5 * found["b"]
    assert torch.allclose(shares[0] + shares[1], torch.ones(B, T))
    assert torch.allclose(shares[0] / shares[1], torch.tensor(3 * math.e))
    text = WHOLE.predicts_text()
    rows = [[t + 1 < T and LAYOUT[b][t + 1] in "pr" for t in range(T)] for b in range(B)]
    assert text.tolist() == rows
