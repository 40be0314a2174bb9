"""Routing and experts against float64 twins that go token by token."""

import pytest
import torch
import torch.nn.functional as F

from mmkd.ops import Routing, balance_loss, expert_ffn, route, z_loss

N, E, H, INNER, OUT = 13, 4, 8, 16, 8  # sizes that grouped_mm can take on a CPU too
BACKENDS = ["torch", "grouped"]


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def case(gated, biased, seed=0, dtype=torch.float64):
    """x, logits and weights, all of them leaves."""
    made = {"x": normal(N, H, seed=seed), "logits": normal(N, E, seed=seed + 1)}
    made |= {"up": normal(E, INNER, H, seed=seed + 2), "down": normal(E, OUT, INNER, seed=seed + 3)}
    if gated:
        made["gate"] = normal(E, INNER, H, seed=seed + 4)
    if biased:
        made |= {
            "up_bias": normal(E, INNER, seed=seed + 5),
            "down_bias": normal(E, OUT, seed=seed + 6),
        }
        if gated:
            made["gate_bias"] = normal(E, INNER, seed=seed + 7)
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def ours(tensors, top_k, backend="torch"):
    rest = {k: v for k, v in tensors.items() if k not in ("x", "logits")}
    routing = route(tensors["logits"], top_k)
    return expert_ffn(tensors["x"], routing, activation=F.silu, backend=backend, **rest)


def twin(tensors, top_k):
    """One token and one expert at a time, from the definition."""
    rows = []
    for x, logits in zip(tensors["x"], tensors["logits"], strict=True):
        p = logits.exp() / logits.exp().sum()
        best = sorted(range(E), key=lambda e: -p[e].item())[:top_k]
        row = 0
        for e in best:
            inner = tensors["up"][e] @ x
            if "up_bias" in tensors:
                inner = inner + tensors["up_bias"][e]
            if "gate" in tensors:
                gate = tensors["gate"][e] @ x
                if "gate_bias" in tensors:
                    gate = gate + tensors["gate_bias"][e]
                inner = F.silu(gate) * inner
            else:
                inner = F.silu(inner)
            y = tensors["down"][e] @ inner
            if "down_bias" in tensors:
                y = y + tensors["down_bias"][e]
            row = row + p[e] / sum(p[b] for b in best) * y
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_values_and_gradients_equal_a_float64_twin(gated, biased, top_k):
    tensors = case(gated, biased)
    got, want = ours(tensors, top_k), twin(tensors, top_k)
    torch.testing.assert_close(got, want)
    weights = normal(N, OUT, seed=50)
    pairs = zip(
        torch.autograd.grad((got * weights).sum(), list(tensors.values())),
        torch.autograd.grad((want * weights).sum(), list(tensors.values())),
        strict=True,
    )
    for (a, b), name in zip(pairs, tensors, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_one_grouped_product_is_expert_after_expert(gated, biased):
    tensors = case(gated, biased, dtype=torch.float32)
    weights = normal(N, OUT, seed=50).float()
    found = {}
    for backend in BACKENDS:
        y = ours(tensors, 2, backend)
        found[backend] = (y, *torch.autograd.grad((y * weights).sum(), list(tensors.values())))
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_equal_experts_are_the_dense_network(top_k, backend):
    """Sparse upcycling changes nothing, wherever tokens go."""
    tensors = case(True, False, dtype=torch.float32)
    for name in ("up", "gate", "down"):
        tensors[name] = tensors[name][:1].expand(E, -1, -1).contiguous()
    x = tensors["x"]
    inner = F.silu(x @ tensors["gate"][0].T) * (x @ tensors["up"][0].T)
    torch.testing.assert_close(
        ours(tensors, top_k, backend), inner @ tensors["down"][0].T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_tokens_get_no_gradient(backend):
    tensors = case(True, True, dtype=torch.float32)
    with torch.no_grad():
        tensors["logits"][:, 2:] = -50.0
    y = ours(tensors, 2, backend)
    grads = torch.autograd.grad((y * torch.ones_like(y)).sum(), [tensors["up"], tensors["down"]])
    for grad in grads:
        assert bool((grad[2:] == 0).all())
        assert bool((grad[:2] != 0).any())


def test_no_tokens_at_all():
    tensors = case(True, False, dtype=torch.float32)
    tensors |= {"x": tensors["x"][:0], "logits": tensors["logits"][:0]}
    assert ours(tensors, 2).shape == (0, OUT)


def test_a_token_does_not_depend_on_its_neighbours():
    """Nothing is dropped, however many tokens one expert gets."""
    tensors = case(True, False, dtype=torch.float32)
    with torch.no_grad():
        tensors["logits"][:, 1] += 50.0
    whole = ours(tensors, 2)
    for i in range(N):
        alone = {k: v[i : i + 1] if k in ("x", "logits") else v for k, v in tensors.items()}
        torch.testing.assert_close(ours(alone, 2)[0], whole[i], rtol=1e-5, atol=1e-5)


def test_bfloat16_and_autocast_keep_the_router_in_float32():
    tensors = case(True, False, dtype=torch.float32)
    want = ours(tensors, 2)
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(tensors["logits"].bfloat16(), 2)
        got = ours(tensors, 2)
    assert routing.probabilities.dtype == torch.float32
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.5)
    halves = {k: v.detach().bfloat16() for k, v in tensors.items()}
    assert ours(halves, 2).dtype == torch.bfloat16


def test_gates_are_the_best_probabilities_scaled_to_one():
    routing = route(torch.tensor([[1.0, 3.0, 2.0, 3.5]]), 2)
    assert routing.experts.tolist() == [[3, 1]]
    e = torch.tensor([3.5, 3.0]).exp()
    torch.testing.assert_close(routing.gates, (e / e.sum())[None])


def test_the_balance_loss_counts_what_the_mask_leaves():
    """By hand: tokens 0 and 1 go to experts 0 and 1, token 2 is padding."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [9.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([True, True, False])
    p = logits[:2].softmax(-1)
    want = 2 * (p[:, 0].mean() * 0.5 + p[:, 1].mean() * 0.5)
    torch.testing.assert_close(balance_loss(route(logits, 1), mask), want)
    want = sum(torch.log(row.exp().sum()) ** 2 for row in logits[:2]) / 2
    torch.testing.assert_close(z_loss(logits, mask), want)
    nothing = torch.zeros(3).bool()
    assert balance_loss(route(logits, 1), nothing).item() == 0
    assert z_loss(logits, nothing).item() == 0


def test_the_balance_loss_is_one_for_even_and_the_experts_for_one_sided_routing():
    even = torch.full((E, E), -40.0) + 80 * torch.eye(E)
    assert balance_loss(route(even, 1)).item() == pytest.approx(1.0)
    one_sided = torch.zeros(N, E)
    one_sided[:, 2] = 80.0
    assert balance_loss(route(one_sided, 2)).item() == pytest.approx(E)


def test_the_balance_loss_has_the_gradient_of_its_definition():
    logits = normal(N, E).requires_grad_()
    p = logits.softmax(-1)
    share = F.one_hot(p.argmax(-1), E).double().mean(0)
    want = torch.autograd.grad(E * (p.mean(0) * share).sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(balance_loss(route(logits, 2)), logits), want)


BAD = [
    ({"x": normal(N + 1, H)}, r"x must be \[13, H\]"),
    ({"up": normal(E, INNER, H + 1)}, r"up must be \[4, F, 8\]"),
    ({"gate": normal(E, INNER + 1, H)}, r"gate must be \[4, 16, 8\]"),
    ({"down": normal(E, OUT, INNER + 1)}, r"down must be \[4, H, 16\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_shapes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        ours({**case(True, False), **change}, 2)


def test_unknown_settings():
    tensors = case(True, False)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        ours(tensors, 2, "fast")
    for top_k in (0, E + 1):
        with pytest.raises(ValueError, match=f"cannot choose {top_k} experts"):
            route(tensors["logits"], top_k)
    assert isinstance(route(tensors["logits"], 1), Routing)
