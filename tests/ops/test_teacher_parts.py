"""Divergences against a part of the teacher's tokens, and their naive float64 twins."""

import pytest
import torch

from mmkd.ops import DIVERGENCES, Head, HeadLoss, SparseRows, head_losses
from mmkd.ops.cells import FIRST_TOKENS, cells_of_logits
from mmkd.ops.terms import TeacherPart
from tests.support.divergences import by_definition
from tests.support.heads import N, V, parts

PARTS = [
    {"top_k": 4},
    {"top_p": 0.7},
    {"top_k": 6, "top_p": 0.9},
    {"top_k": 4, "rest": "drop"},
    {"top_p": 0.8, "rest": "drop"},
]


def dense(x, vocab, temperature):
    return (x[0] @ x[1].t() + x[2])[:, :vocab] / temperature


def chosen_tokens(row, top_k=None, top_p=None):
    """Tokens of a row of probabilities, likeliest first, one after the other."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    kept, mass = [], 0.0
    for token in order:
        if (top_k is not None and len(kept) == top_k) or (top_p is not None and mass >= top_p):
            break
        kept.append(token)
        mass += row[token]
    return kept


def twin(kind, student, teacher, *, vocab, temperature, of_teacher, rest="cell", **part):
    """The divergence of each row, [N], by autograd over dense distributions."""
    at_one = torch.softmax(dense(teacher, vocab, 1.0), -1).tolist()
    log_p = torch.log_softmax(dense(teacher, vocab, of_teacher), -1)
    log_q = torch.log_softmax(dense(student, vocab, temperature), -1)
    rows = []
    for n, probabilities in enumerate(at_one):
        kept = chosen_tokens(probabilities, **part)
        others = [token for token in range(len(probabilities)) if token not in kept]
        p, q = log_p[n, kept], log_q[n, kept]
        if rest == "drop":
            p, q = p - p.logsumexp(0), q - q.logsumexp(0)
        elif others:
            p = torch.cat([p, log_p[n, others].logsumexp(0, keepdim=True)])
            q = torch.cat([q, log_q[n, others].logsumexp(0, keepdim=True)])
        rows.append(by_definition(kind, p, q, beta=0.3, alpha=0.2))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize(("temperature", "of_teacher"), [(1.0, None), (2.0, 3.0)])
def test_value_and_gradients_equal_the_twin(kind, part, temperature, of_teacher):
    vocab = V
    student, teacher, mask = parts(21, V + 3, V + 8)
    settings = {"beta": 0.3, "alpha": 0.2, "vocab_size": vocab, **part}
    settings |= {"temperature": temperature, "teacher_temperature": of_teacher}
    loss = HeadLoss(kind, mask, 0.7, **settings)
    ce = HeadLoss("ce", mask.roll(1), 1.3, targets=torch.arange(N) % V, vocab_size=vocab)
    total, sums = head_losses(Head(*student), [loss, ce], Head(*teacher), chunk_size=5)
    at = {"temperature": temperature, "of_teacher": of_teacher or temperature, "vocab": vocab}
    divergence = (twin(kind, student, teacher, **at, **part) * mask).sum()
    logits, labels = dense(student, vocab, 1.0)[mask.roll(1)], ce.targets[mask.roll(1)]
    labelled = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    want = 0.7 * divergence + 1.3 * labelled
    torch.testing.assert_close(
        sums, torch.stack([divergence, labelled]).detach(), rtol=1e-9, atol=0
    )
    for got, exact in zip(
        torch.autograd.grad(total, student), torch.autograd.grad(want, student), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-11)


def both(student, teacher, loss):
    total, sums = head_losses(Head(*student), [loss], teacher)
    return [sums, *torch.autograd.grad(total, student)]


def assert_equal(got, want, **bounds):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize("kind", [*DIVERGENCES, "balanced_kl"])
@pytest.mark.parametrize("part", [{"top_k": V}, {"top_p": 1.0}, {"top_k": V, "rest": "drop"}])
def test_all_tokens_are_the_whole_divergence(kind, part):
    student, teacher, mask = parts(22)
    got = both(student, Head(*teacher), HeadLoss(kind, mask, **part))
    want = both(student, Head(*teacher), HeadLoss(kind, mask))
    assert_equal(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_with_a_cell_never_says_more(kind, part):
    student, teacher, _ = parts(23)
    part = {**part, "rest": "cell"}
    (some,) = head_losses(Head(*student), [HeadLoss(kind, **part)], Head(*teacher))[1]
    (whole,) = head_losses(Head(*student), [HeadLoss(kind)], Head(*teacher))[1]
    assert 0 <= some <= whole


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_drop_is_zero_for_a_student_in_proportion_on_the_chosen_tokens(kind):
    _, teacher, _ = parts(24)
    logits = dense(teacher, V, 1.0)
    noise = torch.randn(N, V, dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    others = torch.ones_like(logits).scatter(1, logits.topk(5).indices, 0)
    head = Head((logits + 3 * others * noise).requires_grad_(), torch.eye(V, dtype=logits.dtype))
    against = Head(logits, torch.eye(V, dtype=logits.dtype))
    total, sums = head_losses(head, [HeadLoss(kind, top_k=5, rest="drop")], against)
    assert sums.item() == pytest.approx(0, abs=1e-12)
    (grad,) = torch.autograd.grad(total, [head.hidden])
    assert kind == "tvd" or grad.abs().max() < 1e-12  # tvd has a corner there
    (compared,) = head_losses(head, [HeadLoss(kind, top_k=5)], against)[1]
    assert compared > 1e-3


def stored(teacher, count):
    log_p = torch.log_softmax(dense(teacher, V, 1.0), -1)
    log_probs, ids = log_p.topk(count)
    rest = log_p.exp().scatter(1, ids, 0).sum(1).log()
    mixed = torch.arange(count).flip(0)  # in any order
    return SparseRows(ids[:, mixed], log_probs[:, mixed], rest, torch.arange(N))


@pytest.mark.parametrize("kind", [*DIVERGENCES, "balanced_kl", "enhanced"])
@pytest.mark.parametrize(
    "part",
    [
        {"top_k": 4},
        {"top_k": 8},
        {"top_p": 0.6},
        {"top_k": 4, "rest": "drop"},
        {"top_k": 4, "rest": "drop", "temperature": 2.0, "teacher_temperature": 0.5},
        {"temperature": 2.0, "teacher_temperature": 1.0, "top_k": 8},
    ],
    ids=str,
)
def test_stored_rows_equal_the_live_teacher(kind, part):
    student, teacher, mask = parts(25)
    loss = HeadLoss(kind, mask, targets=torch.arange(N) % V, **part)
    got = both(student, stored(teacher, 8), loss)
    assert_equal(got, both(student, Head(*teacher), loss), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_temperature_of_the_teacher_alone(kind):
    student, teacher, mask = parts(26)
    (hidden, weight, bias), how = teacher, {"mask": mask, "beta": 0.3}
    cooler = Head(hidden / 3, weight, bias / 3)
    got = both(student, Head(*teacher), HeadLoss(kind, teacher_temperature=3.0, **how))
    assert_equal(got, both(student, cooler, HeadLoss(kind, **how)), rtol=1e-9, atol=1e-12)
    same = both(student, Head(*teacher), HeadLoss(kind, teacher_temperature=1.0, **how))
    assert_equal(same, both(student, Head(*teacher), HeadLoss(kind, **how)), rtol=0, atol=0)


@pytest.mark.parametrize("flat", [False, True])
def test_tokens_of_a_large_vocabulary_are_found_by_parts(flat):
    """More than `FIRST_TOKENS` are needed where the distribution is flat."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 3000, dtype=torch.float64, generator=generator) * (0.5 if flat else 12)
    cells = cells_of_logits(logits.clone(), TeacherPart(top_p=0.9))
    assert (cells.ids.shape[1] > FIRST_TOKENS) == flat
    for n, row in enumerate(torch.softmax(logits, -1).tolist()):
        want = chosen_tokens(row, top_p=0.9)
        kept = cells.kept[n, :-1]
        assert cells.ids[n][kept].tolist() == want
        others = 1 - sum(row[token] for token in want)
        assert cells.log_p[n, -1].exp().item() == pytest.approx(others, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0, it must be at least 1"),
        ({"top_p": 1.5}, r"top_p is 1.5, it must be in \(0, 1\]"),
        ({"rest": "keep"}, "rest is 'keep', it must be cell or drop"),
        ({"teacher_temperature": 0.0}, "teacher's temperature is 0.0, it must be positive"),
        ({"top_k": 9}, "top_k is 9, stored rows have 8 tokens"),
        ({"teacher_temperature": 2.0}, "temperature 1, the loss asks for 2.0: take rest='drop'"),
    ],
)
def test_settings_out_of_range(settings, message):
    student, teacher, _ = parts(27)
    with pytest.raises(ValueError, match=message):
        head_losses(Head(*student), [HeadLoss("kl", **settings)], stored(teacher, 8))
