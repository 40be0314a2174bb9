"""Distillation of responses between models with different tokenizers.

Both objectives compare chunks: the shortest pieces of a response that begin and end at a token
boundary of both tokenizers. The end of turn is a chunk of its own. For n chunks c:

    alm   L = 1/n sum_c D(p(c), q(c))
          p(c) and q(c) are the likelihoods of the chunk under teacher and student, and D is a
          divergence between Bernoulli distributions at a temperature tau: `mmkd.ops.likelihood`.
          This is Approximate Likelihood Matching (Minixhofer, Vulić and Ponti, arXiv 2503.20083).
    uld   L = 1/n sum_c sum_i |p_(i) - q_(i)|
          p and q are the sorted next-token distributions at the first token of a chunk:
          `mmkd.ops.uld`. This is Universal Logit Distillation (Boizard et al. 2024,
          arXiv 2402.12030). The paper compares the k-th tokens of both models; here both
          distributions belong to the same place in the text.

Debiasing of `alm`. The likelihood of a chunk's tokens depends on how the tokenizer could have gone
on: after "a", a model with a token "ab" excludes the continuation "b", and a model without it does
not. So two models of the same distribution over texts differ. Let B be the tokens that begin with
white space or are special. If one of them comes next, the text before is complete under both
tokenizers:

    none      log p(c | x)
    outcome   log p(c | x) + log p(B | x c)
    both      log p(c | x) + log p(B | x c) - log p(B | x)

x is the text before the chunk, and p(B | x) is the probability that the next token is in B.
`outcome` is the paper's debiasing ("append_space" in the authors' code, tokenkit). `both` is
mmkd's: it also removes the bias of the context, for chunks that come directly after another chunk
and whose first token is in B under both tokenizers. Then the result is the likelihood of the chunk
up to a boundary, given a boundary before it. It is the same for two models of one distribution over
texts. The student learns p(B | x) from the chunk before. The first chunk of an answer has none, and
with the last term nothing would lower the probability of wrong tokens that are not in B. A chunk
that begins inside of a word keeps the bias of its context. The end of turn is a special token,
after which no text goes on: there, p(B | x c) is 1.

With `hidden`, the loss of a chunk has a further term, where h are the final hidden states at its
last token and W is a linear map that trains with the student:

    hidden * |W h_s - h_t|^2 / |h_t|^2

The paper divides by the variance of each channel over the batch. Here each chunk is divided by its
own mean square, so that the loss does not depend on the batch layout. The chunks are those before
merging.

A chunk with p(B | x c) < gamma under the teacher ends inside of a word, and is merged with the next
chunks of its answer, as in the authors' code. This depends on the answer alone, not on the batch. n
is the number of chunks before they are merged, because it must be known before the models run.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.objectives.base import DecoderParts, Objective, Outcome
from mmkd.objectives.chunks import Boundaries, Chunks, ChunkTokens
from mmkd.objectives.linear_maps import apply_map, linear_map
from mmkd.objectives.settings import AlmConfig, UldConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets
from mmkd.ops import Head, binary_divergence, linear_uld, set_logps, token_logps

EPSILON = 1e-8
"""Is added to the mean square of the teacher's hidden state."""


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
            return Outcome(0 * self._unused(student))
        return Outcome(self._total(student, teacher, chunks) / count)

    def _unused(self, student: Signals) -> Tensor:
        """A scalar that depends on what the loss depends on, for a batch without chunks."""
        return student.hidden.sum()

    def _total(self, student: Signals, teacher: Signals, chunks: Chunks) -> Tensor:
        """Sum of the loss over chunks, a scalar."""
        raise NotImplementedError

    def _chunks(self, targets: Targets) -> Chunks:
        if targets.chunks is None:
            raise ValueError(f"objective {self.name!r} needs chunks")
        chosen = targets.in_selected_sources
        if chosen is None:
            return targets.chunks
        return targets.chunks.where(chosen.flatten()[targets.chunks.student.first_rows])


class Alm(ChunkObjective):
    config_class = AlmConfig
    config: AlmConfig

    def _total(self, student: Signals, teacher: Signals, chunks: Chunks) -> Tensor:
        how = self.config
        mine = self._logps(student, chunks.student)
        with torch.no_grad():
            theirs = self._logps(teacher, chunks.teacher)
        if how.debias != "none":
            mine, theirs = self._debiased(student, teacher, chunks, (mine, theirs))
        total = binary_divergence(
            theirs, mine, kind=how.divergence, temperature=how.temperature
        ).sum()
        return (
            total
            if self.own is None
            else total + how.hidden * self._distances(student, teacher, chunks)
        )

    def own_modules(self, student: DecoderParts, teacher: DecoderParts | None) -> nn.Module | None:
        if not self.config.hidden:
            return None
        assert teacher is not None  # a cache has no tokens of its own
        return linear_map(student.width, teacher.width)

    def _unused(self, student: Signals) -> Tensor:
        found = super()._unused(student)
        # modules with sharded weights must run in every batch
        return found if self.own is None else found + apply_map(self.own, student.hidden[:0]).sum()

    def _distances(self, student: Signals, teacher: Signals, chunks: Chunks) -> Tensor:
        """Sum of the distances of hidden states at the ends of chunks."""
        assert self.own is not None
        mine = apply_map(self.own, _head(student, chunks.student.last_rows).hidden)  # [chunks, H]
        theirs = _head(teacher, chunks.teacher.last_rows).hidden.detach().float()
        squares = (mine - theirs).square().mean(-1)
        return (squares / (theirs.square().mean(-1) + EPSILON)).sum()

    def _debiased(
        self, student: Signals, teacher: Signals, chunks: Chunks, logps: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of merged chunks under student and teacher, [merged] each.

        Args:
            student, teacher: their signals.
            chunks: of the batch.
            logps: log-likelihoods of the chunks' tokens under student and teacher, [chunks] each.
        """
        bounds = chunks.boundaries
        if bounds is None:
            raise ValueError(f"objective {self.name!r} needs the boundaries of chunks")
        mine = self._masses(student, chunks.student, bounds.student, bounds)
        with torch.no_grad():
            theirs = self._masses(teacher, chunks.teacher, bounds.teacher, bounds)
        ends = _ends(theirs[1], bounds.answer, self.config.gamma)
        given = self._given(chunks, bounds)  # [chunks]
        return (
            _merged(logps[0], *mine, ends=ends, given=given & chunks.student.follows),
            _merged(logps[1], *theirs, ends=ends, given=given & chunks.teacher.follows),
        )

    def _given(self, chunks: Chunks, bounds: Boundaries) -> Tensor:
        """[chunks] bool: chunks whose likelihoods are conditional on a boundary before them."""
        if self.config.debias != "both":
            return torch.zeros_like(bounds.closing)
        begins = bounds.student[chunks.student.first_ids]
        begins = begins & bounds.teacher[chunks.teacher.first_ids]
        begins[1:] &= bounds.answer[1:] == bounds.answer[:-1]
        return begins

    def _masses(
        self, signals: Signals, tokens: ChunkTokens, mask: Tensor, bounds: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of a boundary before and after each chunk, [chunks] each.

        Most chunks begin where another one ends, so each position is projected once.
        """
        both = torch.cat([tokens.first_rows, tokens.last_rows])
        rows, places = both.unique(return_inverse=True)
        head = _head(signals, rows)
        found = set_logps(
            head.hidden,
            head.weight,
            mask,
            bias=head.bias,
            vocab_size=self.shared_vocabulary,
            memory=self.head_memory,
        )[places]
        before, after = found.chunk(2)
        return before, after.masked_fill(bounds.closing, 0)

    def _logps(self, signals: Signals, tokens: ChunkTokens) -> Tensor:
        """Log-likelihoods of the chunks' tokens, [chunks]."""
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


def _ends(after: Tensor, answer: Tensor, gamma: float) -> Tensor:
    """[chunks] bool: the last chunk of each merged chunk. A merged chunk ends where a boundary has
    at least probability gamma, or where the answer ends.

    Args:
        after: [chunks], the teacher's log-probability of a boundary after each chunk.
        answer: [chunks] int64, ascending.
        gamma: 0 for no merging.
    """
    ends = after.exp() >= gamma
    ends[:-1] |= answer[1:] != answer[:-1]
    ends[-1:] = True
    return ends


def _merged(logps: Tensor, before: Tensor, after: Tensor, *, ends: Tensor, given: Tensor) -> Tensor:
    """Log-likelihoods of merged chunks under one model, at most 0.

    Args:
        logps: [chunks], log-likelihoods of the chunks' tokens.
        before, after: [chunks], log-probabilities of a boundary before and after each chunk.
        ends: [chunks] bool, the last chunk of each merged chunk.
        given: [chunks] bool, whether the likelihood is conditional on a boundary before the chunk.
    """
    starts = ends.roll(1)  # the last chunk is an end, so the first one is a start
    group = starts.cumsum(0) - 1  # [chunks], index of the merged chunk
    sums = after[ends] - before.masked_fill(~given, 0)[starts]
    # rounding could make a certain chunk's likelihood larger than 1
    return sums.index_add(0, group, logps).clamp(max=0)


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
