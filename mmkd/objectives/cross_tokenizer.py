"""Distillation of responses between models with different tokenizers.

Both compare chunks: the finest pieces of a response that begin and end with a token for student and
teacher alike; the end of turn is one. With n chunks and c one of them:

    alm   L = 1/n sum_c D(p(c)^(1/tau), q(c)^(1/tau))
          p(c) and q(c) are the teacher's and the student's likelihood of the chunk behind what
          stands before it, D a divergence of yes and no: `mmkd.ops.likelihood`. Approximate
          Likelihood Matching (Minixhofer, Vulić and Ponti, arXiv 2503.20083) on its shortest
          chunks; its debiasing of chunks is not done. KL and tau = 100 are the defaults of its
          authors' code (tokenkit, `binary_ce` and `binarization_temp`), KL less a constant.
    uld   L = 1/n sum_c sum_i |p_(i) - q_(i)|
          p and q are the next-token distributions where a chunk begins, sorted: `mmkd.ops.uld`.
          Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030), which compares the
          k-th token of both; here the places in the text are the same.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome, Signals, Targets
from mmkd.objectives.chunks import Chunks, ChunkTokens
from mmkd.objectives.settings import AlmConfig, UldConfig
from mmkd.ops import Head, binary_divergence, linear_uld, token_logps


class ChunkObjective(Objective):
    """Base of objectives on chunks; one row a chunk, that of its first token."""

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
        """The sum over chunks."""
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
        """[chunks]: log-likelihoods."""
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
    """The head at some rows of a model's own tokens."""
    hidden = signals.hidden if signals.own_hidden is None else signals.own_hidden
    return Head(hidden.flatten(0, 1)[rows], signals.head_weight, signals.head_bias)
