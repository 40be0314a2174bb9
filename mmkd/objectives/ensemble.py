"""Weights of several teachers that an objective on the head's output compares with.

Let K(t) be the teachers that cover row t, by the data source of its record, and w_k their weights:

    L = 1/|M| sum_{t in M} sum_{k in K(t)} v_k(t) D(p_k(t), q(t))
    v_k(t) = S(t) w_k exp(-CE_k(y_t) / kappa) / sum_{j in K(t)} w_j exp(-CE_j(y_t) / kappa)

CE_k(y_t) is teacher k's cross-entropy of the next token of the text, so that a teacher that
predicts a token well has more weight there. v has no gradient. At rows whose next token is no text,
such as those of image tokens, and without `kappa`, v_k(t) = S(t) w_k / sum_{j in K(t)} w_j.

S(t) is the sum of w_k over K(t), which is v_k = w_k without `kappa`, or 1 with `normalize`. With
`normalize`, M are the rows that any teacher covers; otherwise each teacher has a mean of its own.

A sum of v_k KL(p_k || q) with weights that sum to 1 has the gradient of KL(sum_k v_k p_k || q), the
mean of the teachers' distributions in MEAL V2 (Shen and Savvides 2020, arXiv 2009.08453). The
weights by token are in the spirit of MulKI (arXiv 2411.06764), which weighs two teachers of each
sample.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.objectives.base import Objective
from mmkd.objectives.signals import Signals, TeacherSignals
from mmkd.objectives.targets import Targets
from mmkd.ops import token_logps


@dataclass(frozen=True)
class Member:
    """One of several teachers.

    Attributes:
        name: of the teacher.
        weight: w, positive.
        sources: indices of the data sources on which it is used; None for all.
    """

    name: str
    weight: float
    sources: frozenset[int] | None = None


@dataclass(frozen=True)
class Ensemble:
    """Several teachers whose weights depend on the row.

    Attributes:
        members: all teachers.
        normalize: the weights of each row sum to 1.
        kappa: scale of differences of cross-entropies, in nats; None for static weights.
    """

    members: tuple[Member, ...]
    normalize: bool = False
    kappa: float | None = None

    @property
    def is_static(self) -> bool:
        """Whether each teacher's weight is the same in all rows that it covers."""
        return self.kappa is None and not (self.normalize and self.differ_in_sources)

    @property
    def differ_in_sources(self) -> bool:
        return len({member.sources for member in self.members}) > 1

    @property
    def sources(self) -> frozenset[int] | None:
        """The data sources of all members; None for all."""
        found: frozenset[int] = frozenset()
        for member in self.members:
            if member.sources is None:
                return None
            found |= member.sources
        return found

    def static_weight(self, weight: float) -> float:
        """A member's weight, if it is the same in all rows."""
        return weight / sum(m.weight for m in self.members) if self.normalize else weight

    def row_weights(
        self, targets: Targets, logps: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """v_k(t) / w_k by name of the teacher, [B, T]; 0 at rows that the teacher does not cover.

        Args:
            targets: of the batch, of all sources.
            logps: by name of the teacher, [B, T], log-probability of the next token where it is
                known and the teacher covers the row; 0 elsewhere. Not needed without `kappa`.
            dtype: of the weights.
        """
        covers = torch.stack([_covered(m, targets) for m in self.members])  # [K, B, T]
        weights = torch.tensor([m.weight for m in self.members], dtype=dtype, device=covers.device)
        static = torch.where(covers, weights[:, None, None], 0)
        scores = weights.log()[:, None, None].expand(covers.shape)
        if self.kappa is not None:
            known = torch.stack([logps[m.name] for m in self.members])
            scores = scores + known.to(dtype) / self.kappa
        shares = scores.masked_fill(~covers, -torch.inf).softmax(0)  # NaN where no teacher is
        total = 1 if self.normalize else static.sum(0)
        found = torch.where(covers, shares * total / weights[:, None, None], 0)
        return dict(zip((m.name for m in self.members), found, strict=True))


def _covered(member: Member, targets: Targets) -> Tensor:
    """[B, T] bool: tokens of the records on which a teacher is used."""
    covered = targets.of(member.sources).in_selected_sources
    return torch.ones_like(targets.attention) if covered is None else covered


@torch.no_grad()
def row_weights(
    objectives: Sequence[Objective],
    asked: Callable[[str], TeacherSignals | None],
    targets: Targets,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Row weights by name of the teacher, [B, T], for the objectives of a stage that have an
    ensemble, which is the same for all of them; empty if none has.

    Args:
        objectives: on the head's output.
        asked: returns the signals of a teacher by its name; None if the batch does not need it.
        targets: of the batch.
        dtype: of the weights.
    """
    weighed = [o for o in objectives if o.ensemble is not None]
    if not weighed:
        return {}
    ensemble = weighed[0].ensemble
    assert ensemble is not None
    logps: dict[str, Tensor] = {}
    if ensemble.kappa is not None:
        text = targets.predicts_text()
        for member in ensemble.members:
            covered = targets.of(member.sources)
            chosen = torch.zeros_like(text)
            for objective in weighed:
                if objective.teacher == member.name:
                    chosen |= objective.rows(covered) & text
            logps[member.name] = _next_token_logps(weighed[0], asked(member.name), chosen, targets)
    return ensemble.row_weights(targets, logps, dtype)


def _next_token_logps(
    objective: Objective, teacher: TeacherSignals | None, rows: Tensor, targets: Targets
) -> Tensor:
    """A teacher's log-probability of the next token at some rows, [B, T]; 0 at the others."""
    if teacher is None:  # it covers no row of the batch
        return torch.zeros(rows.shape, device=rows.device)
    if not isinstance(teacher, Signals):
        raise TypeError("teachers of an ensemble must be live")
    found = token_logps(
        teacher.hidden[rows],
        teacher.head_weight,
        targets.next_ids()[rows],
        bias=teacher.head_bias,
        vocab_size=objective.shared_vocabulary,
        memory=objective.head_memory,
    )
    return found.new_zeros(rows.shape).masked_scatter(rows, found)
