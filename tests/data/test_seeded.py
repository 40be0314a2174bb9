"""Sampling with a seed of each row."""

import random
from collections import Counter

import pytest
import torch

from mmkd.data.seeded import SeededSampling
from mmkd.recipe import SamplingConfig

IDS = torch.zeros(1, 1, dtype=torch.long)


def drawn(settings: SamplingConfig, seed: int, scores: torch.Tensor) -> int:
    chosen = SeededSampling(settings, [seed])(IDS, scores[None])[0]
    assert chosen.isfinite().sum() == 1
    return int(chosen.argmax())


def test_tokens_are_the_inverse_of_the_cumulative_sum():
    """A plain float64 loop over the vocabulary gives the same tokens, and their frequencies are
    the probabilities."""
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    settings = SamplingConfig(temperature=0.7)
    probabilities = (scores.double() / 0.7).softmax(-1).tolist()
    found = Counter()
    for seed in range(4000):
        token = drawn(settings, seed, scores)
        level, expected = random.Random(seed).random(), 0
        while level >= probabilities[expected]:
            level -= probabilities[expected]
            expected += 1
        assert token == expected
        found[token] += 1
    chi_square = sum((found[i] - 4000 * p) ** 2 / (4000 * p) for i, p in enumerate(probabilities))
    assert chi_square < 18.5  # 99.9 % of samples, 4 degrees of freedom


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 2}, {2, 4}),
        ({"top_p": 0.6}, {2, 4}),
        ({"top_k": 3, "top_p": 0.3}, {2}),
        ({"temperature": 1e-3}, {2}),
    ],
)
def test_only_allowed_tokens_are_drawn(settings, allowed):
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5])
    config = SamplingConfig(**{"temperature": 1.0, **settings})
    assert {drawn(config, seed, scores) for seed in range(200)} == allowed


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    steps = torch.randn(6, 4, 50)  # [step, B, V]
    settings = SamplingConfig(temperature=1.3)

    def tokens(rows: list[int]) -> list[list[int]]:
        sampling = SeededSampling(settings, [100 + row for row in rows])
        return torch.stack([sampling(IDS, s[rows]).argmax(-1) for s in steps], 1).tolist()

    together = tokens([0, 1, 2, 3])
    assert tokens([2]) == together[2:3]
    assert tokens([3, 0]) == [together[3], together[0]]
    assert len({tuple(row) for row in together}) == 4


def test_tokens_of_probability_zero_are_never_drawn():
    scores = torch.full((8,), -torch.inf)
    scores[3] = 1.0
    assert {drawn(SamplingConfig(), seed, scores) for seed in range(50)} == {3}


def test_logits_that_are_not_finite_are_an_error():
    scores = torch.tensor([0.0, torch.nan, 1.0])
    with pytest.raises(RuntimeError, match="probability tensor"):
        drawn(SamplingConfig(), 0, scores)
