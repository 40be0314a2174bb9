"""Signs of teacher hacking on simulated validations, and against a fit by torch in float64."""

import math
import random

import pytest
import torch

from mmkd.runtime.teacher_hacking import (
    FEWEST,
    find_hacking,
    leaves_line,
    noise,
    sign_at_last,
)

EVERY = 200


def proxies(rng, count, spread, *, slope=0.5, stall=None):
    """A KL that falls as a power of the step, up to a validation from which it stays."""
    steps = [EVERY * (i + 1) for i in range(count)]
    last = steps[-1] if stall is None else steps[stall]
    falling = [2 * min(step, last) ** -slope * math.exp(rng.gauss(0, spread)) for step in steps]
    return steps, falling


def answers(rng, count, spread, *, turn=None, rise=0.15):
    """A cross-entropy that falls, and rises from a validation on."""
    values = [1 + 0.5 * math.exp(-8 * i / count) for i in range(count)]
    if turn is not None:
        values = [v + rise * max(i - turn, 0) / (count - turn) for i, v in enumerate(values)]
    return [v * math.exp(rng.gauss(0, spread)) for v in values]


def leaves_line_twin(steps, values):
    """By least squares over the middle third, and the textbook's prediction error."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (steps, values))
    third = len(steps) // 3
    own = slice(third, len(steps) - third)
    design = torch.stack([torch.ones_like(x), x], dim=1)
    inverse = torch.linalg.inv(design[own].T @ design[own])
    weights = inverse @ design[own].T @ y[own]
    rest = y - design @ weights
    variance = rest[own].square().sum() / (len(x[own]) - 2)
    errors = (variance * (1 + (design @ inverse * design).sum(1))).sqrt()
    return bool((rest[-3:] > 3 * errors[-3:]).all())


def test_the_line_equals_a_float64_twin():
    rng = random.Random(1)
    found = set()
    for _ in range(200):
        count = rng.randrange(FEWEST, 40)
        stall = rng.choice([None, 2 * count // 3])
        steps, values = proxies(rng, count, rng.choice([0.01, 0.03]), stall=stall)
        flagged = leaves_line(steps, values)
        assert flagged == leaves_line_twin(steps, values)
        found.add(flagged)
    assert found == {True, False}


@pytest.mark.parametrize(
    ("spread", "least", "most"), [(0.01, 0.98, 1), (0.03, 0.8, 0.97), (0.1, 0, 0.1)]
)
def test_a_stall_after_two_thirds_is_caught_if_there_is_little_noise(spread, least, most):
    """Of 60 validations, and hardly ever seen where there is none."""
    rng = random.Random(0)
    caught = [leaves_line(*proxies(rng, 60, spread, stall=40)) for _ in range(300)]
    false = [leaves_line(*proxies(rng, 60, spread)) for _ in range(300)]
    assert least <= sum(caught) / 300 <= most
    assert sum(false) <= 1


def test_a_line_is_rarely_left_at_some_validation_of_a_stage():
    """The more validations there are, the more often chance looks like a sign."""
    rng = random.Random(0)
    found = [find_hacking(*proxies(rng, 60, s)) for s in (0.01, 0.03, 0.1) for _ in range(100)]
    assert sum(sign is not None for sign in found) <= 0.06 * 300


def test_a_floor_from_the_start_is_not_seen():
    """It bends the curve before the line is fitted."""
    rng = random.Random(0)
    curves = [proxies(rng, 60, 0.03) for _ in range(100)]
    assert not any(leaves_line(steps, [0.02 + v for v in values]) for steps, values in curves)


@pytest.mark.parametrize("spread", [0.002, 0.01])
def test_answers_that_turn_are_found_near_their_best(spread):
    rng, found = random.Random(0), []
    for _ in range(50):
        steps, proxy = proxies(rng, 60, 0.01)
        found.append(find_hacking(steps, proxy, answers(rng, 60, spread, turn=40, rise=0.25)))
    signs = [sign for sign in found if sign is not None and sign.sign == "answers"]
    assert len(signs) >= 47
    for sign in signs:
        assert 25 * EVERY <= sign.stop <= 48 * EVERY
        assert 41 * EVERY <= sign.seen <= 57 * EVERY


def test_answers_that_do_not_turn_are_not_found():
    """Neither where they still fall, nor where they stay, over all 60 validations of a stage."""
    rng = random.Random(0)
    found = [
        find_hacking(*proxies(rng, 60, 0.01), answers(rng, 60, spread))
        for spread in (0.002, 0.01)
        for _ in range(100)
    ]
    assert sum(f is not None and f.sign == "answers" for f in found) <= 4


def test_answers_decide():
    """A line that is left counts if the answers are no better than before. Answers that rise count
    if the student comes closer to its teacher."""
    rng = random.Random(0)
    steps, stalled = proxies(rng, 60, 0.01, stall=40)
    falling = [2 - 0.01 * i for i in range(60)]
    assert sign_at_last(steps, stalled).sign == "trend"
    assert sign_at_last(steps, stalled, falling) is None
    flat = [1 + 0.001 * (i % 2) for i in range(60)]
    assert sign_at_last(steps, stalled, [0.999, *flat[1:]]).sign == "trend"
    rising = [1 + 0.01 * max(20 - i, i - 20) for i in range(60)]
    away = [2 + 0.01 * i for i in range(60)]
    assert sign_at_last(steps, away, rising).sign == "trend"
    assert sign_at_last(steps, away[::-1], rising).sign == "answers"
    assert sign_at_last(steps, away[::-1], rising).stop == 21 * EVERY


def test_noise_of_a_curve():
    rng = random.Random(0)
    values = [0.01 * i + rng.gauss(0, 0.3) for i in range(3000)]
    assert noise(values) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("proxy", [[0.0] * 20, [1.0] * 5, []])
def test_too_little_is_no_sign(proxy):
    steps = [EVERY * (i + 1) for i in range(len(proxy))]
    assert find_hacking(steps, proxy) is None
    assert find_hacking(steps, proxy, [1.0] * len(proxy)) is None
