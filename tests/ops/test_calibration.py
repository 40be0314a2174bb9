"""Calibration: bins and errors against naive twins, and temperatures that are known."""

import math

import pytest
import torch

from mmkd.ops.calibration import Predictions, Reliability, predictions, token_predictions
from mmkd.ops.temperature import HIGHEST, LOWEST, fit_temperature

N, H, V = 57, 7, 23


def model(seed=0, dtype=torch.float64, rows=N):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    logits = hidden.double() @ weight.double().t() + bias.double()
    drawn = torch.multinomial((logits / 1.5).softmax(1), 1, generator=g)[:, 0] if rows else []
    return hidden, weight, bias, torch.as_tensor(drawn, dtype=torch.int64)


def twin_rows(logits, targets):
    """Confidence, correctness, NLL and Brier score of each row, token by token."""
    found = []
    for row, true in zip(logits.tolist(), targets.tolist(), strict=True):
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        p = [w / sum(weights) for w in weights]
        brier = sum((x - (i == true)) ** 2 for i, x in enumerate(p))
        found.append((max(p), p.index(max(p)) == true, -math.log(p[true]), brier))
    return found


def twin_ece(confidences, correct, bins):
    """Equation 3 of Guo et al., bin by bin."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidences) if (m - 1) / bins < c <= m / bins]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


def of(confidence, correct):
    zeros = torch.zeros(len(confidence), dtype=torch.float64)
    return Predictions(
        torch.as_tensor(confidence, dtype=torch.float64), torch.as_tensor(correct), zeros, zeros
    )


@pytest.mark.parametrize("chunk", [None, 1, 10, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_tokens_are_judged_as_by_definition(chunk, temperature):
    hidden, weight, bias, targets = model()
    found = token_predictions(
        hidden, weight, targets, bias=bias, temperature=temperature, chunk_size=chunk
    )
    twin = twin_rows((hidden @ weight.t() + bias) / temperature, targets)
    for name, values in zip(
        ("confidence", "correct", "nll", "brier"), zip(*twin, strict=True), strict=True
    ):
        got = getattr(found, name)
        assert got.dtype == (torch.bool if name == "correct" else torch.float64)
        torch.testing.assert_close(
            got.double(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_float64_for_narrow_states(dtype):
    """Only the product with the head is rounded, as in the model itself."""
    hidden, weight, bias, targets = model(dtype=dtype)
    found = token_predictions(hidden, weight, targets, bias=bias)
    logits = (hidden @ weight.t()).float() + bias.float()
    want = predictions(logits, targets)
    torch.testing.assert_close(found.nll, want.nll, rtol=1e-6, atol=1e-6)
    assert found.nll.dtype == torch.float64


def test_padding_rows_of_the_head_get_no_probability():
    hidden, weight, bias, targets = model()
    targets = targets % 20
    padded = torch.cat([weight[:20], 100 * weight[20:]])
    found = token_predictions(hidden, padded, targets, bias=bias, vocab_size=20)
    want = token_predictions(hidden, weight[:20], targets, bias=bias[:20])
    torch.testing.assert_close(found.nll, want.nll)
    torch.testing.assert_close(found.confidence, want.confidence)


def test_no_rows_give_no_predictions():
    hidden, weight, _, targets = model(rows=0)
    found = token_predictions(hidden, weight, targets)
    assert len(found.nll) == len(found.correct) == 0
    reliability = Reliability()
    reliability.add(found)
    assert (reliability.count, reliability.ece) == (0, 0.0)


@pytest.mark.parametrize("bins", [1, 3, 10, 15])
@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_error_is_that_of_the_definition(bins, batch):
    g = torch.Generator().manual_seed(bins)
    confidence = torch.rand(500, generator=g, dtype=torch.float64)
    confidence[:20] = torch.arange(1, 21).double() / 20  # edges of bins
    correct = torch.rand(500, generator=g) < 0.6
    found = Reliability(bins)
    for start in range(0, 500, batch):
        found.add(of(confidence[start : start + batch], correct[start : start + batch]))
    want = twin_ece(confidence.tolist(), correct.tolist(), bins)
    assert found.ece == pytest.approx(want, abs=1e-12)
    facts = found.facts()
    assert sum(b["count"] for b in facts["bins"]) == facts["count"] == 500
    assert facts["accuracy"] == pytest.approx(float(correct.double().mean()))
    assert facts["confidence"] == pytest.approx(float(confidence.mean()))


def test_the_error_of_a_calibrated_set_goes_to_0():
    g = torch.Generator().manual_seed(3)
    errors = []
    for n in (100, 10_000, 1_000_000):
        confidence = torch.rand(n, generator=g, dtype=torch.float64)
        correct = torch.rand(n, generator=g, dtype=torch.float64) < confidence
        found = Reliability()
        found.add(of(confidence, correct))
        errors.append(found.ece)
    # Ten bins of n/10 predictions: the mean distance in a bin is below sqrt(10 / n) / 2.
    assert all(e < 0.5 * math.sqrt(10 / n) for e, n in zip(errors, (1e2, 1e4, 1e6), strict=True))
    assert errors[0] > errors[1] > errors[2]


def test_the_error_of_an_overconfident_set_is_the_gap():
    """Confidence c, and every second prediction right: |c - 1/2|."""
    for c in (0.6, 0.95, 1.0):
        found = Reliability()
        found.add(of([c] * 1000, [i % 2 == 0 for i in range(1000)]))
        assert found.ece == pytest.approx(c - 0.5, abs=1e-12)


def test_gaps_in_two_directions_do_not_cancel():
    found = Reliability()
    found.add(of([0.95] * 10 + [0.55] * 10, [True] * 9 + [False] + [True] * 8 + [False] * 2))
    assert found.ece == pytest.approx((0.05 + 0.25) / 2, abs=1e-12)


def drawn(temperature, rows=20_000, sharp=2.0, seed=5):
    """Rows whose tokens are drawn from softmax(z / temperature), with z as the head's logits."""
    g = torch.Generator().manual_seed(seed)
    z = sharp * torch.randn(rows, V, generator=g, dtype=torch.float64)
    targets = torch.multinomial((z / temperature).softmax(1), 1, generator=g)[:, 0]
    return z, torch.eye(V, dtype=torch.float64), targets


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_fit_finds_the_temperature_that_tokens_were_drawn_with(temperature):
    hidden, weight, targets = drawn(temperature)
    assert fit_temperature(hidden, weight, targets) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("factor", [0.25, 1.7, 6.0])
def test_scaled_logits_get_a_temperature_scaled_alike(factor):
    hidden, weight, targets = drawn(1.0, rows=3000)
    once = fit_temperature(hidden, weight, targets)
    assert fit_temperature(factor * hidden, weight, targets) == pytest.approx(
        factor * once, rel=1e-7
    )


def test_the_fit_is_the_minimum():
    """Against a golden-section search on ln T of the mean NLL."""
    hidden, weight, bias, targets = model(rows=400)
    found = fit_temperature(hidden, weight, targets, bias=bias)

    def nll(log_t):
        t = math.exp(log_t)
        return float(
            token_predictions(hidden, weight, targets, bias=bias, temperature=t).nll.mean()
        )

    low, high = math.log(LOWEST), math.log(HIGHEST)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
    assert math.log(found) == pytest.approx((low + high) / 2, abs=1e-5)


def test_the_fit_does_not_depend_on_chunks_or_a_shift():
    hidden, weight, bias, targets = model(rows=400)
    one = fit_temperature(hidden, weight, targets, bias=bias, chunk_size=1)
    assert fit_temperature(hidden, weight, targets, bias=bias) == pytest.approx(one, rel=1e-9)
    shifted = fit_temperature(hidden, weight, targets, bias=bias + 1e4)
    assert shifted == pytest.approx(one, rel=1e-7)


def test_the_temperature_changes_no_prediction_and_lowers_the_loss():
    hidden, weight, targets = drawn(2.0, rows=3000)
    t = fit_temperature(hidden, weight, targets)
    before, after = (token_predictions(hidden, weight, targets, temperature=x) for x in (1.0, t))
    assert torch.equal(before.correct, after.correct)
    assert after.nll.mean() < before.nll.mean()


@pytest.mark.parametrize(
    ("right", "bound"), [(True, "lowest"), (False, "highest")], ids=["all right", "all wrong"]
)
def test_without_a_minimum_there_is_no_temperature(right, bound):
    hidden = torch.eye(V, dtype=torch.float64)
    targets = torch.arange(V) if right else (torch.arange(V) + 1) % V
    with pytest.raises(ValueError, match=f"still falls at temperature .*the {bound} one"):
        fit_temperature(5 * hidden, hidden, targets)


def test_equal_logits_keep_temperature_1():
    hidden, weight = torch.zeros(3, H), torch.zeros(V, H)
    assert fit_temperature(hidden, weight, torch.tensor([0, 1, 2])) == 1.0


def test_bad_arguments_are_refused():
    hidden, weight, _, targets = model()
    with pytest.raises(ValueError, match=r"hidden must be \[N, H\]"):
        token_predictions(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="it must be positive"):
        token_predictions(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        Reliability(0)
    with pytest.raises(ValueError, match="no rows"):
        fit_temperature(hidden[:0], weight, targets[:0])
    hidden[3, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(hidden, weight, targets)
    with pytest.raises(ValueError, match="not finite"):
        Reliability().add(token_predictions(hidden, weight, targets))
