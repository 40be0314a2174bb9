"""Distillation of responses between models with different tokenizers.

Both objectives compare chunks: the shortest pieces of a response that begin and end at a token
boundary of both tokenizers. The end of turn is a chunk of its own. For n chunks c:

    alm   L = 1/n sum_c D(p(c)^(1/tau), q(c)^(1/tau))
          p(c) and q(c) are the likelihoods of the chunk, given the text before it, under teacher
          and student. D is a divergence between Bernoulli distributions: `mmkd.ops.likelihood`.
          This is Approximate Likelihood Matching (Minixhofer, Vulić and Ponti, arXiv 2503.20083) on
          its shortest chunks, without its debiasing of chunks. KL and tau = 100 are the defaults of
          the authors' code (tokenkit, `binary_ce` and `binarization_temp`); KL differs by a
          constant.
    uld   L = 1/n sum_c sum_i |p_(i) - q_(i)|
          p and q are the sorted next-token distributions at the first token of a chunk:
          `mmkd.ops.uld`. This is Universal Logit Distillation (Boizard et al. 2024,
          arXiv 2402.12030). The paper compares the k-th tokens of both models; here both
          distributions belong to the same place in the text.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome, Signals, Targets
from mmkd.objectives.chunks import Chunks, ChunkTokens
from mmkd.objectives.settings import AlmConfig, UldConfig
from mmkd.ops import Head, binary_divergence, linear_uld, token_logps


class ChunkObjective(Objective):
    """Base class of objectives on chunks. A chunk has one row, that of its first token."""

    any_vocabulary: ClassVar[bool] = True

    def rows(self, targets: Targets) -> Tensor:
        rows = torch.zeros_like(targets.attention)
        rows.view(-1)[self._chunks(targets).student.first_rows] = True
        return rows

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        chunks = self._chunks(targets)
        if not chunks.student.count:
            return Outcome(0 * student.hidden.sum())
        return Outcome(self._total(student, teacher, chunks) / count)

    def _total(self, student: Signals, teacher: Signals, chunks: Chunks) -> Tensor:
        """Sum of the loss over chunks, a scalar."""
        raise NotImplementedError

    def _chunks(self, targets: Targets) -> Chunks:
        if targets.chunks is None:
            raise ValueError(f"objective {self.name!r} needs chunks")
        return targets.chunks


class Alm(ChunkObjective):
    config_class = AlmConfig
    config: AlmConfig

    def _total(self, student: Signals, teacher: Signals, chunks: Chunks) -> Tensor:
        mine = self._logps(student, chunks.student)
        with torch.no_grad():
            theirs = self._logps(teacher, chunks.teacher)
        how = self.config
        return binary_divergence(
            theirs, mine, kind=how.divergence, temperature=how.temperature
        ).sum()

    def _logps(self, signals: Signals, tokens: ChunkTokens) -> Tensor:
        """Log-likelihoods of the chunks, [chunks]."""
        head = _head(signals, tokens.rows)
        found = token_logps(
            head.hidden,
            head.weight,
            tokens.ids,
            bias=head.bias,
            vocab_size=self.shared_vocabulary,
            memory=self.head_memory,
        )
        return found.new_zeros(tokens.count).index_add(0, tokens.chunk, found)


class Uld(ChunkObjective):
    config_class = UldConfig
    config: UldConfig

    def _total(self, student: Signals, teacher: Signals, chunks: Chunks) -> Tensor:
        mine = _head(student, chunks.student.first_rows)
        theirs = _head(teacher, chunks.teacher.first_rows)
        return linear_uld(mine, theirs, vocab_size=self.shared_vocabulary, memory=self.head_memory)


def _head(signals: Signals, rows: Tensor) -> Head:
    """The head, with the hidden states at `rows`: indices into the model's [B * T]."""
    hidden = signals.hidden if signals.own_hidden is None else signals.own_hidden
    return Head(hidden.flatten(0, 1)[rows], signals.head_weight, signals.head_bias)
