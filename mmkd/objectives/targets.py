"""Token ids, masks and labels of a batch, as objectives read them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmkd.objectives.base_settings import Region
from mmkd.objectives.chunks import Chunks


@dataclass(frozen=True)
class Targets:
    """Token ids, masks and labels of a batch. A mask marks tokens, not the positions that predict
    them.

    Attributes:
        input_ids: [B, T] int64.
        attention: [B, T] bool, False on padding.
        response: [B, T] bool, tokens of the assistant's turns, including the end of turn.
        vision: [B, T] bool, image tokens.
        vision_labels: [B, T] int64 or None, the token of the object's name for image tokens inside
            an object's box, -100 elsewhere.
        end_id: id of the end-of-turn token.
        background: [B, T] bool or None, tokens of a labelled image that are outside of all boxes.
        rejected: [B] bool or None, sequences with rejected answers: the second half of a batch of
            preference pairs.
        reference_logps: [B] or None, log-probabilities of the answers under the reference model of
            a preference objective.
        starts: [B, T] bool or None, first token of each record in packed rows.
        chunks: pieces of responses that student and teacher have in common, or None.
        sources: [B, T] int64 or None, index of the data source of a token's record.
        in_selected_sources: [B, T] bool or None, tokens of the records that the objective covers;
            None for all.
    """

    input_ids: Tensor
    attention: Tensor
    response: Tensor
    vision: Tensor
    vision_labels: Tensor | None = None
    background: Tensor | None = None
    end_id: int = 0
    rejected: Tensor | None = None
    reference_logps: Tensor | None = None
    starts: Tensor | None = None
    chunks: Chunks | None = None
    sources: Tensor | None = None
    in_selected_sources: Tensor | None = None

    def of(self, sources: frozenset[int] | None) -> "Targets":
        """The same targets, with regions restricted to the records of some data sources; None for
        all sources."""
        if sources is None:
            return self
        if self.sources is None:
            raise ValueError("the batch does not say which sources its records are from")
        wanted = torch.tensor(sorted(sources), device=self.sources.device)
        return replace(self, in_selected_sources=torch.isin(self.sources, wanted))

    def predicts(self, region: Region) -> Tensor:
        """[B, T] bool: the rows (positions) whose output distributions belong to a region.

        Position t predicts token t+1, so `response` begins at the last prompt token. `vision`
        covers the positions of the image tokens themselves (LLaVA-KD, arXiv 2410.16236, section
        3.2), and `all` covers every position except padding. Rejected answers and records of other
        data sources belong to no region.
        """
        if region == "vision":
            rows = self.vision
        elif region == "all":
            rows = self.attention
        elif region == "prompt":
            rows = self._before(self.attention & ~self.response & ~self.vision)
        else:
            rows = self._before(self.response)
        rows = self.covered(rows)
        return rows if self.rejected is None else rows & ~self.rejected[:, None]

    def covered(self, tokens: Tensor) -> Tensor:
        """[B, T] bool: those of some tokens that are in records which the objective covers."""
        return tokens if self.in_selected_sources is None else tokens & self.in_selected_sources

    def predicts_text(self) -> Tensor:
        """[B, T] bool: the rows whose next token is a text token of the same record."""
        return self._before(self.attention & ~self.vision)

    def predicts_answers(self) -> Tensor:
        """[B, T] bool: the rows that predict response tokens, including those of rejected
        answers."""
        return self._before(self.response)

    def _before(self, tokens: Tensor) -> Tensor:
        if self.starts is not None:
            tokens = tokens & ~self.starts  # the token before belongs to another record
        rows = torch.zeros_like(tokens)
        rows[:, :-1] = tokens[:, 1:]
        return rows & self.attention

    def next_ids(self) -> Tensor:
        """[B, T] int64: the next token at each position. The last column has no meaning."""
        return torch.roll(self.input_ids, -1, dims=1)
