"""`engine.head_memory` and `head_backend`: how every objective goes through the head, and that its
loss does not depend on it."""

import pytest
import torch

from mmkd.objectives import (
    REGISTRY,
    Boundaries,
    Chunks,
    ChunkTokens,
    Exit,
    ExitSignals,
    Signals,
    Targets,
    build_objective,
)
from mmkd.ops import (
    DIVERGENCES,
    head_losses,
    linear_sinkhorn,
    linear_uld,
    set_logps,
    token_logps,
)

B, T, H, V = 4, 30, 6, 40
PROJECTING = (head_losses, linear_sinkhorn, linear_uld, set_logps, token_logps)
SETTINGS = {
    "ce": {},
    "kl": {},
    "reverse_kl": {},
    **{kind: {} for kind in DIVERGENCES[2:]},
    "balanced_kl": {},
    "enhanced": {"gamma": 1.5},
    "sinkhorn": {},
    "token_labels": {"at": "decoder", "background": True},
    "alm": {},
    "uld": {},
    "preference": {"loss": "sigmoid"},
    "exits": {"layers": [1]},
}
ELSEWHERE = {"relation", "affinity", "minilm", "balance", "router_z", "mixer_mse", "layer_l2",
             "hidden_mse", "matrix", "embedding", "mutual"}  # fmt: skip
"""Kinds that make no logits."""


def signals(seed):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    hidden = normal(B, T, H)
    exits = {Exit(1): ExitSignals(hidden, 1.0)}
    return Signals(hidden, normal(V, H), normal(V), exits=exits)


def targets():
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    numbers = torch.arange(1, B * T)
    tokens = ChunkTokens(numbers - 1, ids.flatten()[numbers], (numbers - 1) // 2)
    answer = torch.arange(tokens.count) // 7
    boundaries = Boundaries(answer, answer < 0, *[torch.arange(V) % 3 == 0] * 2)
    return Targets(
        ids,
        everywhere,
        everywhere,
        everywhere,
        torch.full_like(ids, -100),
        everywhere,
        rejected=torch.arange(B) >= B // 2,
        reference_logps=torch.zeros(B, dtype=torch.float64),
        chunks=Chunks(tokens, tokens, boundaries),
    )


def run(kind, monkeypatch, **how):
    """An objective's loss, gradients, and the most rows that met the head at one time."""
    cls = REGISTRY[kind]
    config = cls.config_class(kind=kind, **SETTINGS[kind])
    rows = []
    for function in PROJECTING:
        names = function.__globals__
        project = names["project"]

        def watched(hidden, *rest, project=project):
            rows.append(len(hidden))
            return project(hidden, *rest)

        monkeypatch.setitem(names, "project", watched)
    student, teacher = signals(0), signals(1)
    loss = build_objective(config, **how)(student, teacher, targets(), 7.0).loss
    loss.backward()
    monkeypatch.undo()
    return loss, student.hidden.grad, student.head_weight.grad, max(rows)


@pytest.mark.parametrize("kind", SETTINGS)
def test_memory_decides_how_many_rows_meet_the_head_at_once(kind, monkeypatch):
    *whole, most = run(kind, monkeypatch)
    *parts, few = run(kind, monkeypatch, head_memory=1)
    assert most > 16
    assert few == 16  # fewer would be slow, and save nothing
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_every_kind_is_here_or_makes_no_logits():
    assert SETTINGS.keys() | ELSEWHERE == REGISTRY.keys()
    assert not SETTINGS.keys() & ELSEWHERE


@pytest.mark.parametrize("wanted", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["ce", "jsd", "token_labels"])
def test_the_backend_is_the_one_that_is_asked_for(kind, wanted, monkeypatch):
    asked = []
    monkeypatch.setitem(
        head_losses.__globals__, "kernel_for", lambda backend, *rest: asked.append(backend)
    )
    config = REGISTRY[kind].config_class(kind=kind, **SETTINGS[kind])
    build_objective(config, head_backend=wanted)(signals(0), signals(1), targets(), 1.0)
    assert asked == [wanted]
