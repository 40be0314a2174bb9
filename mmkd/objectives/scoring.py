"""Evaluate all objectives of a stage on one batch. Objectives on the head's output share one
projection of each chunk of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome
from mmkd.objectives.ensemble import row_weights
from mmkd.objectives.gradient_norms import GradientNorms
from mmkd.objectives.signals import Signals, StoredSignals, TeacherSignals
from mmkd.objectives.targets import Targets
from mmkd.ops import Head, HeadLoss, SparseRows, head_losses

ACCEPTANCE = "acceptance"
"""Name of the metric of divergences with `acceptance: true`."""


class HeadObjective(Objective):
    """Base class of objectives on the output of the head."""

    def head_loss(self, targets: Targets) -> HeadLoss:
        """The loss on the head's output, with a mask of the rows in [B * T] that it covers."""
        raise NotImplementedError

    def acceptance(self, targets: Targets) -> HeadLoss | None:
        """The total variation distance, which is only measured, for the metric `acceptance`."""
        return None

    def __call__(
        self, student: Signals, teacher: TeacherSignals | None, targets: Targets, count: float
    ) -> Outcome:
        total, *_ = _one_pass([self], [1 / count], student, teacher, targets)
        return Outcome(total)


def _one_pass(
    objectives: Sequence[HeadObjective],
    factors: Sequence[float],
    student: Signals,
    teacher: TeacherSignals | None,
    targets: Targets,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The weighted sum of losses, with gradients, and without: each loss's sum over its rows, and
    by objective the number of rows less their total variation distances. `weights` are those of
    the teacher of an ensemble, [B, T]."""
    losses, measured = [], {}
    for objective, factor in zip(objectives, factors, strict=True):
        if "teacher" in objective.needs and teacher is None:
            raise ValueError(f"objective {objective.name!r} needs a teacher")
        covered = targets.of(objective.sources)
        loss = objective.head_loss(covered).scaled(factor)
        if objective.ensemble is not None and weights is not None:
            loss = loss.weighted(weights.flatten())
        losses.append(loss)
        if (distance := objective.acceptance(covered)) is not None:
            measured[objective.name] = distance
    theirs: Head | SparseRows | None
    if isinstance(teacher, StoredSignals):
        theirs = teacher.rows
    else:
        theirs = None if teacher is None else head_of(teacher)
    how = objectives[0]  # all objectives of a stage have the same head_memory and head_backend
    total, sums = head_losses(
        head_of(student),
        [*losses, *measured.values()],
        theirs,
        memory=how.head_memory,
        backend=how.head_backend,
    )
    accepted = {
        name: _rows(loss) - distance
        for (name, loss), distance in zip(measured.items(), sums[len(losses) :], strict=True)
    }
    return total, sums[: len(losses)], accepted


def _rows(loss: HeadLoss) -> Tensor:
    assert loss.mask is not None
    return loss.mask.sum()


def head_of(signals: Signals) -> Head:
    """The head with the final hidden states, as rows [B * T, H]."""
    return Head(signals.hidden.flatten(0, 1), signals.head_weight, signals.head_bias)


Teachers = Mapping[str, TeacherSignals]
"""Signals by name of the teacher, for the teachers that a batch needs, in the recipe's order."""


def signals_for(
    name: str | None, teacher: TeacherSignals | Teachers | None
) -> TeacherSignals | None:
    """The signals of one of several teachers.

    Args:
        name: of the teacher; None for the first one.
        teacher: signals of the only teacher, or of several by name.
    """
    if not isinstance(teacher, Mapping):
        return teacher
    return next(iter(teacher.values()), None) if name is None else teacher.get(name)


def hidden_states(teacher: TeacherSignals | None) -> Signals | None:
    """The signals with a teacher's final hidden states, of a live teacher or from a cache."""
    return teacher.signals if isinstance(teacher, StoredSignals) else teacher


def score(
    objectives: Sequence[Objective],
    student: Signals,
    teacher: TeacherSignals | Teachers | None,
    targets: Targets,
    counts: Mapping[str, float],
    norms: GradientNorms | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of all objectives on a batch.

    Args:
        objectives: of a stage.
        student: signals of the student.
        teacher: signals of the teacher, or of several teachers by name; None if no objective needs
            one.
        targets: of the batch.
        counts: by name of an objective, the number of its rows in the global batch.
        norms: give the objectives their weights in place of the recipe, and measure their
            gradients. Objectives on the head's output then do not share a projection.

    Returns:
        The loss with gradients, and by name the detached values of the objectives and their
        metrics.
    """

    def asked(name: str | None) -> TeacherSignals | None:
        return signals_for(name, teacher)

    # A gathered objective takes part without records too: other processes wait for it.
    silent = [o for o in objectives if o.teacher and asked(o.teacher) is None and not o.gathers]
    speaking = [o for o in objectives if o not in silent]
    nothing = student.hidden.new_zeros(())
    terms: list[Tensor] = []
    said = {o.name: nothing for o in silent}
    # Names in an order that does not depend on the batch: ranks add them up by position.
    metrics = {f"{o.name}/{metric}": nothing for o in objectives for metric in o.metric_names}
    passes = _passes(speaking, apart=norms is not None)
    wide = torch.promote_types(student.hidden.dtype, torch.float32)
    weights = row_weights([o for _, heads in passes for o in heads], asked, targets, wide)
    for name, heads in passes:
        factors = [_weight_of(o, norms) / counts[o.name] for o in heads]
        read, row_factors = _read_by(heads[0], student, norms), weights.get(name or "")
        total, sums, accepted = _one_pass(heads, factors, read, asked(name), targets, row_factors)
        terms.append(total)
        metrics |= {
            _accepts(o): accepted[o.name] / counts[o.name] for o in heads if o.name in accepted
        }
        said |= {o.name: value / counts[o.name] for o, value in zip(heads, sums, strict=True)}
    for objective in speaking:
        if not isinstance(objective, HeadObjective):
            read, theirs = _read_by(objective, student, norms), asked(objective.teacher)
            outcome = _alone(objective, read, theirs, targets, counts[objective.name])
            terms.append(_weight_of(objective, norms) * outcome.loss)
            said[objective.name] = outcome.loss.detach()
            metrics |= {f"{objective.name}/{k}": v.detach() for k, v in outcome.metrics.items()}
    if not terms or any(o.teacher or o.sources is not None for o in objectives):
        terms.append(_no_loss(student, head=not passes))
    return torch.stack(terms).sum(), {o.name: said[o.name] for o in objectives} | metrics


def _weight_of(objective: Objective, norms: GradientNorms | None) -> float:
    return objective.config.weight if norms is None else norms.weight_of(objective)


def _read_by(objective: Objective, student: Signals, norms: GradientNorms | None) -> Signals:
    """The student's signals for an objective, whose gradient is measured if there are norms."""
    if norms is None:
        return student
    return replace(student, hidden=norms.watched(objective, student.hidden))


def _alone(
    objective: Objective,
    student: Signals,
    theirs: TeacherSignals | None,
    targets: Targets,
    count: float,
) -> Outcome:
    """The outcome of an objective that shares no projection."""
    if not objective.accepts_stored_rows:
        theirs = hidden_states(theirs)
    covered = targets.of(objective.sources)
    return objective(student, theirs, covered, count)  # type: ignore[arg-type]


def _no_loss(student: Signals, *, head: bool) -> Tensor:
    """0, with gradients for what objectives would read that have no rows or whose teacher did not
    run.

    Processes exchange gradients, and each must have them for the same weights. A batch of one
    process may have no records of a teacher or of a data source.

    Args:
        student: signals of the student.
        head: no other objective reads the output head.
    """
    read = [student.hidden, *(place.hidden for place in student.exits.values())]
    if head:
        read += [w for w in (student.head_weight, student.head_bias) if w is not None]
    return torch.stack([tensor[:0].sum().to(student.hidden.dtype) for tensor in read]).sum()


def _accepts(objective: Objective) -> str:
    return f"{objective.name}/{ACCEPTANCE}"


def _passes(
    objectives: Sequence[Objective], *, apart: bool = False
) -> list[tuple[str | None, list[HeadObjective]]]:
    """Objectives on the head's output, grouped by teacher, with the teacher's name. Those that need
    no teacher are added to the first group.

    Args:
        objectives: of any kind.
        apart: one group for each objective.
    """
    heads = [o for o in objectives if isinstance(o, HeadObjective)]
    first = next((o.teacher for o in heads if o.teacher is not None), None)
    if apart:
        return [(o.teacher or first, [o]) for o in heads]
    passes: dict[str | None, list[HeadObjective]] = {}
    for objective in heads:
        passes.setdefault(objective.teacher or first, []).append(objective)
    return list(passes.items())
