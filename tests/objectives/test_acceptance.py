"""The metric `acceptance` of divergences: 1 - tvd, without any effect on training."""

import pytest
import torch

from mmkd.objectives import Signals, Targets, build_objective, score
from mmkd.objectives.divergence_settings import CrossEntropyConfig, DivergenceConfig, JsdConfig

B, T, H, V = 3, 8, 5, 13


def signals(seed, width=H):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    return Signals(normal(B, T, width), normal(V, width), normal(V))


def targets():
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    response = torch.arange(T).expand(B, T) >= torch.tensor([3, 4, 6])[:, None]
    everywhere = torch.ones_like(response)
    return Targets(ids, everywhere, response, ~response)


def scored(objectives, parts):
    """Losses, metrics and gradients, summed over parts of a batch."""
    student, teacher = signals(2), signals(3, width=7)
    whole = targets()
    counts = {o.name: float(o.rows(whole).sum()) for o in objectives}
    sums, total = {}, 0.0
    for rows in parts:
        some = Targets(*(x[rows] for x in (whole.input_ids, whole.attention, whole.response,
                                           whole.vision)))  # fmt: skip
        ours, theirs = (Signals(s.hidden[rows], s.head_weight, s.head_bias) for s in
                        (student, teacher))  # fmt: skip
        loss, said = score(objectives, ours, theirs, some, counts)
        total = total + loss
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in said.items()}
    leaves = [student.hidden, student.head_weight, student.head_bias]
    return sums, torch.autograd.grad(total, leaves), (student, teacher, whole)


@pytest.mark.parametrize("region", ["response", "vision"])
def test_it_is_the_overlap_of_both_distributions(region):
    """Whatever the temperature and the part of the teacher that the divergence reads."""
    config = DivergenceConfig(
        kind="kl", region=region, acceptance=True, temperature=3.0, top_k=4, name="k"
    )
    objective = build_objective(config)
    sums, _, (student, teacher, whole) = scored([objective], [slice(None)])
    rows = whole.predicts(region)
    p, q = (
        torch.softmax(s.hidden[rows] @ s.head_weight.t() + s.head_bias, -1)
        for s in (teacher, student)
    )
    want = torch.minimum(p, q).sum(-1).mean().item()
    assert sums["k/acceptance"] == pytest.approx(want, rel=1e-12)


def test_it_does_not_depend_on_the_batch_layout_and_changes_no_gradient():
    def objectives(acceptance):
        return [
            build_objective(CrossEntropyConfig()),
            build_objective(DivergenceConfig(kind="reverse_kl", acceptance=acceptance)),
            build_objective(JsdConfig(kind="jsd", region="vision", acceptance=acceptance)),
        ]

    whole, grads, _ = scored(objectives(True), [slice(None)])
    parts, _, _ = scored(objectives(True), [slice(0, 1), slice(1, 3)])
    assert parts == pytest.approx(whole, rel=1e-12)
    plain, want, _ = scored(objectives(False), [slice(None)])
    assert {n: v for n, v in whole.items() if not n.endswith("/acceptance")} == plain
    assert whole.keys() - plain.keys() == {"reverse_kl/acceptance", "jsd/acceptance"}
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
