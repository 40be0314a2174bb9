"""Scan, step and mixing matrix of every backend against a naive float64 recurrence."""

import pytest
import torch
import torch.nn.functional as F

from mmkd.ops import ssd_matrix, ssd_scan, ssd_step
from mmkd_models import scan_spans
from tests.support.recurrences import (
    TOLERANCE,
    agree,
    backends,
    close,
    device_of,
    leaves,
    problem,
    scan,
    twin,
)

scan_backends = backends("mamba_chunk_scan_combined")
# Heads of the state, groups of B, groups of C; the last two share a state among query heads.
FORMS = [(4, 1, 1), (4, 2, 2), (4, 4, 4), (4, 1, 4), (4, 4, 2), (6, 2, 3), (2, 1, 6), (2, 2, 4)]


@scan_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 64), (5, 64), (32, 16), (45, 16)])
def test_scan_equals_the_recurrence(backend, form, length, chunk_size):
    tensors = problem(form, length)
    agree(lambda t: scan(t, backend, chunk_size=chunk_size), lambda t: twin(*t), tensors, backend)


@scan_backends
def test_scan_without_skip_and_initial_state(backend):
    tensors = problem()[:5]
    agree(lambda t: ssd_scan(*t, backend=backend), lambda t: twin(*t), tensors, backend)


def test_batch_and_time_are_cut_into_blocks(monkeypatch):
    for elements in (1, 2**11, 2**13):
        monkeypatch.setitem(scan_spans.BLOCK_ELEMENTS, "cpu", elements)
        tensors = problem(length=70, batch=5)
        agree(lambda t: scan(t, chunk_size=8), lambda t: twin(*t), tensors)


def test_chunk_size_does_not_matter():
    tensors = problem(length=100)
    whole, final = scan(tensors, chunk_size=100)
    for size in (1, 3, 32, 64, 1000):
        y, state = scan(tensors, chunk_size=size)
        close(y, whole, 1e-12)
        close(state, final, 1e-12)


@scan_backends
@pytest.mark.parametrize("form", [(4, 2, 4), (2, 1, 6)])
def test_two_calls_equal_one_and_steps_equal_the_scan(backend, form):
    tensors = problem(form, length=40)
    want, final = twin(*tensors)
    x, dt, A, B, C, D, state = (t.to(device_of(backend), torch.float32) for t in tensors)
    first, state = scan([x[:, :29], dt[:, :29], A, B[:, :29], C[:, :29], D, state], backend)
    rows = [first]
    # The step kernel knows no shared states: "auto" leaves those to torch.
    stepper = "auto" if form[2] > form[0] else backend
    for t in range(29, 40):
        before = state.clone()
        y, new = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D, backend=stepper)
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        rows.append(y[:, None])
        state = new
    close(torch.cat(rows, 1), want, TOLERANCE[backend][0])
    close(state, final, TOLERANCE[backend][0])
    assert state.dtype == torch.float32


def test_step_has_gradients():
    tensors = problem(length=1)

    def step(t):
        x, dt, A, B, C, D, state = t
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D)
        return y[:, None], state

    agree(step, lambda t: twin(*t), tensors)


@scan_backends
def test_shared_states_equal_repeated_heads(backend):
    x, dt, A, B, C, D, state = (
        t.to(device_of(backend), torch.float32) for t in problem((2, 1, 6), length=20)
    )
    got, got_state = scan([x, dt, A, B, C, D, state], backend)
    want, want_state = scan(
        [
            x.repeat_interleave(3, 2),
            dt.repeat_interleave(3, 2),
            A.repeat_interleave(3),
            B,
            C,
            D,
            state.repeat_interleave(3, 1),
        ],
        backend,
    )
    close(got, want.double().cpu(), TOLERANCE[backend][0])
    close(got_state.repeat_interleave(3, 1), want_state.double().cpu(), TOLERANCE[backend][0])
    assert got_state.shape[1] == 2


@pytest.mark.parametrize("form", [f for f in FORMS if f[2] <= f[0]])
def test_matrix_equals_the_recurrence(form):
    tensors = problem(form)

    def by_matrix(t):
        x, dt, A, B, C = t
        return (torch.einsum("bhts,bshp->bthp", ssd_matrix(dt, A, B, C), x),)

    agree(by_matrix, lambda t: (twin(*t)[0],), tensors[:5])


@scan_backends
@pytest.mark.parametrize("left", [True, False])
def test_padding_leaves_rows_and_states_as_they_are(backend, left):
    tensors = problem(length=30)
    want, final = twin(*tensors)
    x, dt, A, B, C, D, state = (t.to(device_of(backend), torch.float32) for t in tensors)

    def padded(t, value):
        return F.pad(t, (0, 0) * (t.dim() - 2) + ((9, 0) if left else (0, 9)), value=value)

    y, got = scan(
        [padded(x, 3.0), padded(dt, 0.0), A, padded(B, 2.0), padded(C, 5.0), D, state], backend
    )
    close(y[:, 9:] if left else y[:, :30], want, TOLERANCE[backend][0])
    close(got, final, TOLERANCE[backend][0])


@scan_backends
def test_nothing_happens_where_dt_is_zero(backend):
    tensors = problem()
    tensors[1].zero_()
    tensors = [t.to(device_of(backend), torch.float32) for t in tensors]
    assert torch.equal(scan(tensors, backend)[1], tensors[6])


@scan_backends
@pytest.mark.parametrize("strength", [50.0, 1e4])
def test_strong_decay_stays_exact(backend, strength):
    """Some heads forget everything at once, others hardly anything."""
    tensors = problem(length=50)
    tensors[1] = torch.rand_like(tensors[1]) * 2
    tensors[2] = -torch.tensor([strength, 1.0, strength, 1e-8], dtype=torch.float64)
    agree(lambda t: scan(t, backend), lambda t: twin(*t), tensors, backend)
    tensors[2] = torch.full_like(tensors[2], -strength)
    single = leaves(tensors, torch.float32, device_of(backend))
    y, state = scan(single, backend)
    grads = torch.autograd.grad(y.sum() + state.sum(), single)
    assert all(t.isfinite().all() for t in (y, state, *grads))
    _, dt, A, B, C, *_ = single
    matrix = ssd_matrix(dt, A, B, C)
    assert all(g.isfinite().all() for g in torch.autograd.grad(matrix.sum(), [dt, A, B, C]))


@scan_backends
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_keep_a_float32_state(backend, autocast):
    tensors = problem(length=200)
    device = device_of(backend)
    rounded = [t if i in (1, 2, 5, 6) else t.bfloat16().double() for i, t in enumerate(tensors)]
    want, final = twin(*rounded)
    mixed = [
        t.to(device, torch.float32 if i in (1, 2, 5, 6) else torch.bfloat16).requires_grad_()
        for i, t in enumerate(rounded)
    ]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y, state = scan(mixed, backend)
        grads = torch.autograd.grad(y.float().sum(), mixed)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert [g.dtype for g in grads] == [t.dtype for t in mixed]
    close(y, want, 1e-2)  # y itself is rounded to 8 bits
    close(state, final, 1e-5 if backend == "torch" else 1e-2)


@scan_backends
@pytest.mark.parametrize("form", [(4, 2, 4), (2, 1, 6)])
def test_documents_in_a_row_do_not_see_each_other(backend, form):
    tensors = problem(form, length=61)
    ids = torch.tensor([7] * 3 + [2] * 1 + [9] * 30 + [2] * 27).expand(2, -1)
    device = device_of(backend)
    agree(
        lambda t: scan(t, backend, documents=ids.to(device), chunk_size=8),
        lambda t: twin(*t, documents=ids),
        tensors,
        backend,
    )
    x, dt, A, B, C, D, state = (t.to(device, torch.float32) for t in tensors)
    y, final = scan([x, dt, A, B, C, D, state], backend, documents=ids.to(device))
    alone, alone_final = ssd_scan(
        x[:, 34:], dt[:, 34:], A, B[:, 34:], C[:, 34:], D=D, backend=backend
    )
    close(y[:, 34:], alone.double().cpu(), TOLERANCE[backend][0])
    close(final, alone_final.double().cpu(), TOLERANCE[backend][0])


BAD_SCANS = {
    "x must be": lambda t: t.update(x=t["x"][:, :0]),
    "dt must be": lambda t: t.update(dt=t["dt"][:, 1:]),
    "A must be": lambda t: t.update(A=t["A"][1:]),
    "B must be": lambda t: t.update(B=t["B"][:, 0]),
    "B has 3 groups": lambda t: t.update(B=t["B"].repeat(1, 1, 2, 1)[:, :, :3]),
    "C has 3 groups": lambda t: t.update(C=t["C"].repeat(1, 1, 2, 1)[:, :, :3]),
    "state size": lambda t: t.update(C=t["C"][..., 1:]),
    "D must be": lambda t: t.update(D=t["D"][1:]),
    "the state must be": lambda t: t.update(initial_state=t["initial_state"][1:]),
    "documents must be": lambda t: t.update(documents=torch.zeros(2, 37)),
    "chunk_size is 0": lambda t: t.update(chunk_size=0),
    "one of auto, torch, triton": lambda t: t.update(backend="cuda"),
}


@pytest.mark.parametrize("message", BAD_SCANS)
def test_wrong_inputs_get_one_line(message):
    names = ("x", "dt", "A", "B", "C", "D", "initial_state")
    tensors = dict(zip(names, problem(), strict=True))
    BAD_SCANS[message](tensors)
    with pytest.raises(ValueError, match=message) as caught:
        ssd_scan(**tensors)
    assert "\n" not in str(caught.value)
