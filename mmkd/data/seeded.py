"""Sampling whose result depends on a seed of each row, and not on the other rows of the batch.

transformers' `generate` draws the tokens of all rows from one generator, so that an answer depends
on the batch that its prompt is in. Here each row has a generator of its own.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmkd.recipe import SamplingConfig


class SeededSampling(LogitsProcessor):
    """Replaces the scores of each step by 0 for a sampled token and -inf for all others, so that
    greedy decoding picks this token.

    A token is the inverse of the distribution's cumulative sum at a uniform number, after
    temperature, top-k and top-p in transformers' order.

    Args:
        settings: temperature above 0, top_k, top_p.
        seeds: of the rows.
    """

    def __init__(self, settings: SamplingConfig, seeds: Sequence[int]):
        self._uniform = [random.Random(seed) for seed in seeds]
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            input_ids: [B, T] of the prompts and answers so far.
            scores: [B, V] logits of the next token.

        Returns:
            [B, V], 0 and -inf.

        Raises:
            RuntimeError: the probabilities are not finite, as `torch.multinomial` says it.
        """
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        sums = scores.double().softmax(-1).cumsum(-1)  # [B, V]
        if not bool(sums[:, -1].isfinite().all()):
            raise RuntimeError("probability tensor contains nan or inf")
        drawn = [generator.random() for generator in self._uniform]
        level = torch.tensor(drawn, dtype=sums.dtype, device=sums.device)[:, None]
        # `right` skips tokens of probability 0, whose sum equals that of the token before.
        tokens = torch.searchsorted(sums, level * sums[:, -1:], right=True)  # [B, 1]
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
