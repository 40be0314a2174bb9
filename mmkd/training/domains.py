"""Shares of the sources that follow the student's gap to the teacher (`data.sampling`, DDK).

Every `every` steps, the cross-entropies CE_i of student and teacher are measured on held-out
records of each source i, on their true answers. With the ratio of perplexities g_i and N sources
(DDK, arXiv 2407.16154, section 3.2):

    g_i = exp(CE_student,i) / exp(CE_teacher,i)
    r_0 = softmax(g)                                        before the first step
    r_t+1,i = alpha psi_i / sum(psi) + (1 - alpha) / N      with psi_i = r_t,i exp(g_i)

r_t are the shares of the t-th interval of steps. In the first interval, the sources have the shares
of their records, as in the paper. The teacher's losses are measured once.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkd.data.alignment import same_processor
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.microbatches import by_size
from mmkd.data.mixture import MovingMixture
from mmkd.data.records import Records
from mmkd.engines import Engine
from mmkd.errors import CheckpointError, NonFiniteLossError, RecipeError
from mmkd.objectives import Objective, Preference, build_objective, score
from mmkd.objectives.divergence_settings import CrossEntropyConfig
from mmkd.recipe import DomainSampling
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed
from mmkd.teachers import LiveTeacher
from mmkd.training.validation import undisturbed

DIGITS = 4
"""Decimal places of shares. Sums that other numbers of processes round differently then do not
change the records."""
CE = "ce"
Losses = Callable[[Batch], Tensor]
"""Sum of the cross-entropies of a batch's answer tokens."""


def first_shares(gaps: Sequence[float]) -> list[float]:
    """softmax(gaps)."""
    return _normalized([0.0] * len(gaps), gaps)


def next_shares(shares: Sequence[float], gaps: Sequence[float], alpha: float) -> list[float]:
    """The shares of the next interval.

    Args:
        shares: r_t, of N sources.
        gaps: ratios of perplexities, of N sources.
        alpha: in [0, 1].
    """
    logs = [math.log(share) if share > 0 else -math.inf for share in shares]
    psi = _normalized(logs, gaps)
    return [alpha * p + (1 - alpha) / len(psi) for p in psi]


def _normalized(logs: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """exp(logs + gaps), divided by their sum."""
    exponents = [a + b for a, b in zip(logs, gaps, strict=True)]
    largest = max(exponents)  # a gap may be far too large for exp
    found = [math.exp(x - largest) for x in exponents]
    return [x / sum(found) for x in found]


def rounded(shares: Sequence[float]) -> list[float]:
    """Shares with few decimal places, and the sum 1 up to rounding."""
    return [round(share, DIGITS) for share in shares]


@dataclass
class Domains:
    """Measures the sources of a stage, and sets the shares of its next interval.

    Attributes:
        config: settings.
        encoders: of the held-out records, one per source, so that a bad record is replaced by
            another one of its source.
        mixture: of the stage.
        objective: cross-entropy on the answers.
        teacher: with the student's tokens.
        engine: of the stage.
        size: records of a batch.
        seed: of the stage.
        teacher_ce: mean cross-entropies of the teacher, by source.
        history: r_0, ..., r_t.
    """

    config: DomainSampling
    encoders: list[Encoder]
    mixture: MovingMixture
    objective: Objective
    teacher: LiveTeacher
    engine: Engine
    size: int
    seed: int
    teacher_ce: list[float] | None = None
    history: list[list[float]] | None = None

    @property
    def labels(self) -> list[str]:
        """Names of the sources."""
        return [source.config.label for source in self.mixture.records.sources]

    def begin(self, step: int, saved: dict[str, Any] | None, student: Losses) -> None:
        """Measure the sources before the first step, or continue from a checkpoint. Every process
        must call it.

        Args:
            step: of the checkpoint; 0 without one.
            saved: what `state` gave at the checkpoint.
            student: cross-entropies of the student.

        Raises:
            CheckpointError: the checkpoint does not have the shares of all its intervals.
            NonFiniteLossError: a cross-entropy is not finite.
        """
        if step == 0:
            self.teacher_ce = self._measured(self._of_teacher, "the teacher")
            self.history = [rounded(first_shares(self._gaps(student, step)))]
            return
        known = step // self.config.every + 1
        saved = saved or {}
        history, labels = saved.get("history", []), saved.get("sources")
        if labels != self.labels or len(history) != known:
            raise CheckpointError(
                f"it does not have the shares of {known} intervals",
                where=f"checkpoint of step {step}",
                hint="delete the stage's folder to train it again",
            )
        self.teacher_ce, self.history = saved["teacher_ce"], history
        for shares in history[1:]:
            self.mixture.add(shares)

    def due(self, step: int, last: int) -> bool:
        """Whether an interval ends with a step, and another one follows."""
        return step % self.config.every == 0 and step < last

    def update(self, step: int, student: Losses) -> None:
        """Set the shares of the interval that begins after a step. Every process must call it;
        arguments and errors as in `begin`."""
        assert self.history is not None
        gaps = self._gaps(student, step)
        found = rounded(next_shares(self.history[-1], gaps, self.config.alpha))
        self.history.append(found)
        self.mixture.add(found)

    def shares(self, step: int) -> dict[str, float]:
        """Shares of the sources in a step, from 1, as logged."""
        found = self.mixture.shares[(step - 1) // self.config.every]
        return dict(zip(self.labels, rounded(found), strict=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to store, as JSON."""
        return {
            "sources": self.labels,
            "teacher_ce": self.teacher_ce,
            "history": self.history,
        }

    def _gaps(self, student: Losses, step: int) -> list[float]:
        """Ratios of perplexities of student and teacher, by source; the same on all processes."""
        assert self.teacher_ce is not None
        own = self._measured(student, f"the student at step {step}")
        pairs = zip(own, self.teacher_ce, strict=True)
        # A ratio beyond any use would overflow.
        gaps = [math.exp(min(a - b, math.log(1e6))) for a, b in pairs]
        return list(json.loads(distributed.gather([json.dumps(gaps)])[0]))

    def _measured(self, losses: Losses, whose: str) -> list[float]:
        """Mean cross-entropy per answer token of each source's held-out records."""
        count = len(self.labels)
        sums = torch.zeros(2, count, dtype=torch.float64)  # losses and tokens
        with undisturbed(self.seed):
            for source, batch, counts in self._batches():
                batch = batch.to(self.engine.device)
                value = losses(batch).detach().double().cpu()
                if counts:
                    sums[0, source] += value
                    sums[1, source] += float(self.objective.rows(batch.targets).sum())
        totals, tokens = self.engine.total(sums.to(self.engine.device)).cpu()
        found = (totals / tokens.clamp(min=1)).tolist()
        broken = [n for n, x in zip(self.labels, found, strict=True) if not math.isfinite(x)]
        if broken:
            raise NonFiniteLossError(
                f"the cross-entropy of {whose} on held-out records is not finite",
                where=f"data.sampling: {broken[0]}",
                hint="lower the learning rate, or look at the records of this source",
            )
        return found

    def _batches(self) -> Iterator[tuple[int, Batch, bool]]:
        """Source and batch for this process, and whether the batch counts: a process without
        further batches repeats the last one, because sharded models run on all processes."""
        blocks = [
            (number, block)
            for number, encoder in enumerate(self.encoders)
            for block in by_size(range(len(encoder.records)), self.size)
        ]
        for share in distributed.equal_shares(blocks, 1):
            source, block = share[0] if share else blocks[-1]
            yield source, self.encoders[source].encode(block), bool(share)

    def _of_teacher(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.engine.autocast():
            signals = self.teacher.signals(batch).truncate(len(batch.targets.input_ids))
            total, _ = score([self.objective], signals, None, batch.targets, {CE: 1.0})
        return total


def answer_ce(head_memory: int, head_backend: str) -> Objective:
    """Cross-entropy on the answers; arguments as of `build_objective`."""
    return build_objective(
        CrossEntropyConfig(kind="ce", name=CE), head_memory=head_memory, head_backend=head_backend
    )


def build_domains(
    encoder: Encoder,
    mixture: MovingMixture | None,
    engine: Engine,
    teacher: LiveTeacher | None,
    *,
    size: int,
    seed: int,
    head_memory: int,
    head_backend: str,
) -> Domains | None:
    """The measurement of a stage's sources; None without `data.sampling`.

    Args:
        encoder: of the training records.
        mixture: of the stage; None without `data.sampling`.
        engine: of the stage.
        teacher: the primary one; `check_domains` refuses stages without a live one.
        size: records of a batch.
        seed: of the stage.
        head_memory, head_backend: as of `build_objective`.
    """
    sampling = encoder.config.sampling
    if sampling is None:
        return None
    assert mixture is not None
    assert teacher is not None
    objective = answer_ce(head_memory, head_backend)
    data = encoder.config
    own = [
        Encoder.of(
            [objective.config],
            data,
            encoder.processor,
            records=Records(data.model_copy(update={"sources": [source]}), measured=True),
            filler=bool(encoder.filler),
            pack=encoder.pack,
        )
        for source in data.sources
    ]
    return Domains(sampling, own, mixture, objective, teacher, engine, size, seed)


def check_domains(context: StageContext) -> None:
    """Check that the gaps of the sources can be measured, and their shares change.

    Raises:
        RecipeError: the stage has no such teacher, ends within the first interval, or computes a
            reference for all of its records before the first step.
        DataError: a held-out record cannot be encoded.
    """
    sampling = context.data.sampling
    if sampling is None:
        return
    where = f"{context.where}: data.sampling"
    _check_teacher(context, where)
    for objective in context.objectives:
        if isinstance(objective, Preference) and objective.config.reference_logps == "once":
            raise RecipeError(
                "'reference_logps: once' needs all records of the stage before its first step",
                where=where,
                hint="set reference_logps to live",
            )
    per_step = context.stage.batch.records_per_step(distributed.world_size())
    records = len(Records(context.data))
    steps = context.stage.steps or round((context.stage.epochs or 1.0) * records / per_step)
    if steps <= sampling.every:
        raise RecipeError(
            f"the shares change every {sampling.every:,} steps, and the stage has {steps:,}",
            where=where,
            hint="lower 'every', or leave 'sampling' out",
        )
    measured = Records(context.data, measured=True)
    settings = CrossEntropyConfig(kind="ce")
    encoder = Encoder.of([settings], context.data, context.processor, records=measured)
    for first in measured.starts:
        encoder.encode([first])


def _check_teacher(context: StageContext, where: str) -> None:
    teachers = context.recipe.teachers
    if len(teachers) != 1 or not context.needing("teacher"):
        raise RecipeError(
            "it needs one teacher, which an objective of the stage reads"
            + (f", and there are {len(teachers)}" if len(teachers) > 1 else ""),
            where=where,
            hint="name one in the stage's 'teacher', or leave 'sampling' out"
            if len(teachers) > 1
            else "add a teacher and a divergence, or leave 'sampling' out",
        )
    if teachers[0].source != "live":
        raise RecipeError(
            f"a teacher with 'source: {teachers[0].source}' has no losses on held-out records",
            where=where,
            hint="set source to live, or leave 'sampling' out",
        )
    theirs = context.teacher_processor
    if theirs is not None and not same_processor(context.processor, theirs):
        raise RecipeError(
            "the teacher has another processor, so its perplexities are not of the same tokens",
            where=where,
            hint="use a teacher with the student's processor, or leave 'sampling' out",
        )
