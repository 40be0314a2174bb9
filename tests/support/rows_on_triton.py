"""The head's losses by the Triton kernel: on the CPU under Triton's interpreter, or on a GPU.

`test_triton_rows.py` runs this file in processes of its own: Triton chooses at import how to run.
"""

import functools

import pytest
import torch

from mmkd.ops import DIVERGENCES, Head, HeadLoss, SparseRows, head_losses, triton_rows
from mmkd.ops.distributions import Workspace
from mmkd.ops.distributions import chunk_losses as torch_losses
from tests.support.divergences import by_definition
from tests.support.heads import N, V, parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, TOKENS = 3, 75
KINDS = ("ce", *DIVERGENCES)
TARGETS = torch.tensor([74, 0, 32], device=DEVICE)


@pytest.fixture(autouse=True)
def block(request, monkeypatch):
    """Many blocks a row, the last one not full, if a test does not ask for another size."""
    monkeypatch.setattr(triton_rows, "BLOCK", getattr(request, "param", 32))


def logits(seed, rows=ROWS, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    z, t = (torch.randn(rows, TOKENS, generator=g, dtype=torch.float64) for _ in range(2))
    return (spread * z).to(DEVICE), (spread * t).to(DEVICE)


def loss_of(kind, **kwargs):
    return HeadLoss(kind, targets=TARGETS if kind == "ce" else None, **kwargs)


MIXED = [
    HeadLoss("kl", scale=0.5),
    loss_of("ce", scale=2.0),
    HeadLoss("jsd", scale=0.3, beta=0.7),
    HeadLoss("jsd", scale=1.3, beta=0.2),
    HeadLoss("ce", scale=0.1, targets=TARGETS.flip(0)),
]
UNLIKE = [
    *MIXED,
    HeadLoss("reverse_kl", scale=0.2, temperature=2.0),
    HeadLoss("tvd", scale=0.4, temperature=2.0, vocab_size=60),
    HeadLoss("skew_kl", scale=0.6, vocab_size=60),
]


def by_kernel(z, t, losses):
    return found(triton_rows.chunk_losses, z, t, losses)


def by_torch(z, t, losses):
    workspace = Workspace(z.dtype, z.device)
    return found(functools.partial(torch_losses, workspace=workspace), z, t, losses)


def found(chunk_losses, z, t, losses):
    """Each loss's sum, and the gradient of the scaled sum."""
    sums = torch.zeros(len(losses), dtype=torch.float64, device=DEVICE)
    rows = torch.arange(len(z), device=DEVICE)
    grad = chunk_losses(z.clone(), t.clone(), rows, list(enumerate(losses)), sums)
    return sums, grad


def twin(z, t, losses):
    """The same by the definitions, in float64 and by autograd."""
    z = z.double().requires_grad_()
    sums = torch.stack([twin_sum(loss, z, t.double()) for loss in losses])
    scales = sums.new_tensor([loss.scale for loss in losses])
    (grad,) = torch.autograd.grad(scales @ sums, z)
    return sums.detach(), grad


def twin_sum(loss, z, t):
    log_q = torch.log_softmax(z[:, : loss.vocab_size] / loss.temperature, -1)
    log_p = torch.log_softmax(t[:, : loss.vocab_size] / loss.teacher_part.temperature, -1)
    if loss.kind == "ce":
        return -log_q.gather(1, loss.targets[: len(z), None]).sum()

    rows = by_definition(loss.kind, log_p, log_q, beta=loss.beta, alpha=loss.alpha)
    return rows.sum()


def agree(got, want, rtol=1e-5, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("block", [32, 4096], indirect=True)
@pytest.mark.parametrize(("temperature", "of_teacher"), [(1.0, None), (2.5, None), (2.5, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_equals_its_definition_and_torch(kind, temperature, of_teacher):
    z, t = logits(0)
    divided = 1.0 if kind == "ce" else temperature
    how = {"temperature": divided, "teacher_temperature": of_teacher}
    loss = loss_of(kind, scale=0.7, beta=0.3, alpha=0.2, **how)
    got = by_kernel(z.float(), t.float(), [loss])
    agree(got, twin(z.float(), t.float(), [loss]))
    agree(got, by_torch(z.float(), t.float(), [loss]))


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("losses", [MIXED, UNLIKE], ids=["alike", "unlike"])
def test_many_losses_at_once(losses, rows):
    z, t = (x.float() for x in logits(1, rows))
    agree(by_kernel(z, t, losses), twin(z, t, losses))


def test_what_lies_past_the_vocabulary_gets_no_gradient():
    z, t = (x.float() for x in logits(2))
    loss = HeadLoss("jsd", vocab_size=60)
    sums, grad = by_kernel(z, t, [loss])
    assert grad[:, 60:].abs().max() == 0
    short = by_kernel(z[:, :60].contiguous(), t[:, :60].contiguous(), [HeadLoss("jsd")])
    agree((sums, grad[:, :60]), short, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_masked_logits_get_no_mass(kind, least):
    z, t = (x.float() for x in logits(3))
    loss = loss_of(kind, alpha=0.2)
    t[:, 40:64] = least
    z[:, :32] = least  # all of a first block
    t[:, :32] = least
    z[torch.arange(ROWS), TARGETS] = 1.0
    if kind in ("kl", "reverse_kl"):  # infinite, or as good as, where the other has mass
        t[:, 40:64] = z[:, 40:64]
        t[:, :2], z[:, :2] = 0.0, 0.0
        t[torch.arange(ROWS), TARGETS] = 1.0
    agree(by_kernel(z, t, [loss]), twin(z, t, [loss]))


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_logits_stay_finite(kind):
    z, t = (x.float() for x in logits(4, spread=3000.0))
    want = by_torch(z.double(), t.double(), [loss_of(kind)])
    # Gradients are differences of logits, which are rounded at 1e-3 here.
    agree(by_kernel(z, t, [loss_of(kind)]), want, atol=2e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_distributions_are_at_0(kind):
    z = logits(5)[0].float()
    (value,), grad = by_kernel(z, z, [HeadLoss(kind)])
    bound = 0 if kind in ("kl", "reverse_kl", "tvd") else 2e-6
    assert abs(value.item()) <= bound
    assert grad.abs().max() <= bound


@pytest.mark.parametrize(
    ("edge", "plain"),
    [
        (HeadLoss("jsd", beta=0.0), HeadLoss("kl")),
        (HeadLoss("jsd", beta=1.0), HeadLoss("reverse_kl")),
        (HeadLoss("skew_kl", alpha=0.0), HeadLoss("kl")),
        (HeadLoss("skew_reverse_kl", alpha=0.0), HeadLoss("reverse_kl")),
    ],
)
def test_edges_are_other_losses(edge, plain):
    z, t = (x.float() for x in logits(6))
    for got, want in zip(by_kernel(z, t, [edge]), by_kernel(z, t, [plain]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is_and_only_the_gradient_rounded(dtype):
    z, t = (x.to(dtype) for x in logits(7))
    sums, grad = by_kernel(z, t, MIXED)
    exact, wide = by_kernel(z.float(), t.float(), MIXED)
    torch.testing.assert_close(sums, exact, rtol=1e-6, atol=0)
    assert grad.dtype == dtype
    one_unit = torch.finfo(dtype).eps  # the interpreter cuts digits off, a GPU rounds
    torch.testing.assert_close(grad, wide.to(dtype), rtol=one_unit, atol=1e-7)


def test_gradients_of_unlike_losses_add_up_in_float32():
    z, t = (x.bfloat16() for x in logits(8))
    got = by_kernel(z, t, UNLIKE)
    assert got[1].dtype == torch.float32
    agree(got, by_kernel(z.float(), t.float(), UNLIKE), rtol=1e-6, atol=1e-6)


def heads(seed, dtype, bias):
    student, teacher, mask = parts(seed, V + 3, V + 8)
    student, teacher = (
        [x.detach().to(DEVICE, dtype) for x in some[: 3 if bias else 2]]
        for some in (student, teacher)
    )
    return [x.requires_grad_() for x in student], teacher, mask.to(DEVICE)


def results(dtype, backend, bias=True):
    """Total, sums and gradients from hidden states of losses over different rows."""
    student, teacher, mask = heads(9, torch.float32, bias)
    student = [x.detach().to(dtype).requires_grad_() for x in student]
    teacher = [x.to(dtype) for x in teacher]
    losses = [
        HeadLoss("ce", mask, 0.5, targets=torch.arange(N, device=DEVICE) % V),
        HeadLoss("kl", mask.roll(1), vocab_size=V),
        HeadLoss("jsd", mask, 0.7, temperature=2.0, vocab_size=V),
    ]
    total, sums = head_losses(Head(*student), losses, Head(*teacher), chunk_size=4, backend=backend)
    return [total, sums, *torch.autograd.grad(3 * total, student)]


@pytest.mark.parametrize(
    ("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_from_hidden_states_to_gradients(dtype, bias):
    got, want = results(dtype, "triton", bias), results(dtype, "torch", bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_what_the_kernel_cannot_take_is_named():
    student, teacher, _ = heads(10, torch.float64, True)
    loss = HeadLoss("kl", vocab_size=V)
    with pytest.raises(ValueError, match=r"does not support torch\.float64: take backend='auto'"):
        head_losses(Head(*student), [loss], Head(*teacher), backend="triton")
    n, k = 23, 4
    stored = SparseRows(
        torch.arange(k, device=DEVICE).repeat(n, 1),
        torch.full((n, k), -2.0, device=DEVICE),
        torch.full((n,), -0.7, device=DEVICE),
        torch.arange(n, device=DEVICE),
    )
    single = Head(*(x.detach().float() for x in student))
    with pytest.raises(ValueError, match="does not support stored rows"):
        head_losses(single, [loss], stored, backend="triton")
    unfit = {
        "balanced_kl": HeadLoss("balanced_kl", vocab_size=V),
        "weights of rows": HeadLoss("kl", row_weights=torch.ones(n, device=DEVICE), vocab_size=V),
        "a part of the teacher's tokens": HeadLoss("kl", top_k=3, vocab_size=V),
    }
    against = Head(*(x.detach().float() for x in teacher))
    for what, loss in unfit.items():
        with pytest.raises(ValueError, match=f"does not support {what}"):
            head_losses(single, [loss], against, backend="triton")


@pytest.mark.parametrize("block", [triton_rows.BLOCK], indirect=True)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability, monkeypatch):
    """By Triton's compiler down to machine code, of which nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Card:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: capability)
        get_current_stream = staticmethod(lambda device: 0)

    class Compiled(list):
        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.append(row.warmup(*args, grid=grid, **kwargs))

    row, compiled = triton_rows._row, Compiled()
    driver.set_active(Card())
    monkeypatch.setattr(triton_rows, "_row", compiled)
    z, t = logits(0)
    for kind in KINDS:
        by_kernel(z.float(), t.float(), [loss_of(kind)])
    by_kernel(z.bfloat16(), t.bfloat16(), UNLIKE)
    assert len(compiled) == len(KINDS) + 4  # of UNLIKE one for each temperature and width
    assert all(kernel.asm["cubin"] for kernel in compiled)
