"""Objectives that compare all records of a step, in a step of several micro-batches.

    first pass, without gradients:   f_i <- features of each micro-batch
    over all ranks (all-gather):     L(f_1, ..., f_n), and g_i = dL/df_i for this rank's records
    second pass:                     each micro-batch contributes <g_i, f_i>, whose gradient is
                                     that of L

This is GradCache (Gao et al. 2021, arXiv 2101.06983, section 3.2). It costs one forward pass of the
student more. Both passes have the same random states, so the features are the same with dropout
too. Teachers run in the first pass only: if other objectives compare with them, their signals are
kept on the CPU until the second pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.objectives import (
    Features,
    GatheredObjective,
    Need,
    Objective,
    ObjectiveConfig,
    Outcome,
    Signals,
    Targets,
    TeacherSignals,
)
from mmkd.objectives.scoring import hidden_states, signals_for
from mmkd.runtime import distributed
from mmkd.teachers import compares
from mmkd.training.checkpoint import random_states, restore_random_states

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on which the teachers have run.

    Attributes:
        batch: on the engine's device, with log-probabilities of the reference if there is one.
        objectives: that are computed on it.
        teachers: signals of the teachers by name, with the sequence that only fills up a batch.
        random: states of the random number generators before the student's forward pass; None for
            the current ones.
    """

    batch: Batch
    objectives: Sequence[Objective]
    teachers: Mapping[str, TeacherSignals] = field(default_factory=dict)
    random: dict[str, Any] | None = None

    @property
    def compared(self) -> dict[str, TeacherSignals]:
        """Signals of the teachers by name, without a sequence that only fills up the batch."""
        size = len(self.batch.targets.input_ids)
        return {name: signals.truncate(size) for name, signals in self.teachers.items()}

    def restore_random_states(self) -> None:
        """Put the random number generators into the state before the student's forward pass."""
        if self.random is not None:
            restore_random_states(self.random)

    def moved(self, device: torch.device) -> "MicroBatch":
        """The same, with the teachers' signals on a device."""
        return replace(self, teachers={n: s.to(device) for n, s in self.teachers.items()})


Read = Callable[[MicroBatch, Callable[[Signals], dict[str, Features]]], dict[str, Features]]
"""Runs the student on a micro-batch in training mode without gradients, and returns what a function
makes of its signals."""


def gathered_objectives(
    objectives: Sequence[Objective], rows: Mapping[str, float]
) -> list[GatheredObjective]:
    """The objectives that compare all records of a step.

    Args:
        objectives: of a stage.
        rows: by name, the number of records that each covers in the step; those with less than two
            have nothing to compare.
    """
    return [
        o for o in objectives if isinstance(o, GatheredObjective) and o.gathers and rows[o.name] > 1
    ]


def first_pass(
    batches: Sequence[Batch],
    objectives: Sequence[Objective],
    rows: Mapping[str, float],
    *,
    prepare: Callable[[Batch, Sequence[Objective]], MicroBatch],
    read: Read,
) -> Iterator[MicroBatch]:
    """Compute the features of all micro-batches, and yield the micro-batches for the second pass.
    Every process must call it.

    Args:
        batches: of this process, in a step.
        objectives: of the stage.
        rows: the number of records in the step of each objective that is gathered, by name.
        prepare: runs the teachers on a batch.
        read: runs the student on a micro-batch.
    """
    gathered = [o for o in objectives if isinstance(o, GatheredObjective) and o.name in rows]
    others = [o for o in objectives if o.name not in rows]
    again = any(map(compares, others))  # the second pass reads the teachers' signals too
    micros: list[MicroBatch] = []
    features: dict[str, list[Features]] = {name: [] for name in rows}
    for batch in batches:
        micro = replace(prepare(batch, objectives), random=random_states())
        for name, found in read(micro, _reader(gathered, micro)).items():
            features[name].append(found)
        micros.append(micro.moved(CPU) if again else replace(micro, teachers={}))
    shares = {o.name: _shares(o, features.pop(o.name), rows[o.name]) for o in gathered}
    for number, batch in enumerate(batches):
        mine = [shares[o.name][number] if o.name in rows else o for o in objectives]
        device = batch.targets.attention.device
        yield replace(micros.pop(0), objectives=mine).moved(device)


def _reader(
    objectives: Sequence[GatheredObjective], micro: MicroBatch
) -> Callable[[Signals], dict[str, Features]]:
    """A function that computes the features of a micro-batch from the student's signals."""

    targets, theirs = micro.batch.targets, micro.compared

    def read(student: Signals) -> dict[str, Features]:
        found = {}
        for objective in objectives:
            teacher = hidden_states(signals_for(objective.teacher, theirs))
            covered = targets.of(objective.sources)
            found[objective.name] = objective.features_of(student, teacher, covered)
        return found

    return read


def _shares(
    objective: GatheredObjective, features: Sequence[Features], count: float
) -> list["Share"]:
    """An objective's parts of the loss by micro-batch, for the second pass."""
    own = Features.joined(features)
    own.student.requires_grad_()
    with torch.enable_grad():
        loss = objective.compare(own.gathered()) / count
    (gradient,) = torch.autograd.grad(loss, own.student)
    sizes = [len(f.student) for f in features]
    return [
        Share(objective, g, loss.detach() * (size / count))
        for g, size in zip(gradient.split(sizes), sizes, strict=True)
    ]


class ShareConfig(ObjectiveConfig):
    """Settings of a `Share`."""

    needs: ClassVar[frozenset[Need]] = frozenset({"distribution"})


class Share(Objective):
    """The part of a gathered objective's loss that belongs to one micro-batch.

    Its gradient is that of the loss with respect to the micro-batch's features. Its value is the
    loss times the share of the micro-batch's records, so that values sum to the loss.

    Args:
        objective: is gathered.
        gradient: [n, ...], of the loss with respect to the student's features.
        value: scalar.
    """

    config_class = ShareConfig

    def __init__(self, objective: GatheredObjective, gradient: Tensor, value: Tensor):
        config = objective.config
        super().__init__(ShareConfig.model_construct(name=config.metric_name, weight=config.weight))
        self.sources = objective.sources
        self.objective, self.gradient, self.value = objective, gradient, value

    def rows(self, targets: Targets) -> Tensor:
        return self.objective.rows(targets)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        with torch.autocast(targets.attention.device.type, enabled=False):
            product = (self.gradient * self.objective.features(student, targets)).sum()
        return Outcome(self.value + (product - product.detach()))


class HeldOutFeatures:
    """Features of the records of a validation, for the objectives that are gathered.

    Args:
        objectives: of the validation.
    """

    def __init__(self, objectives: Sequence[Objective]):
        self._objectives = objectives
        self._found: dict[str, list[tuple[Tensor, Features]]] = {
            o.name: [] for o in objectives if isinstance(o, GatheredObjective) and o.gathers
        }

    def objectives(self, batch: Batch, counts: bool) -> list[Objective]:
        """The validation's objectives, with those that are gathered replaced by objectives of value
        0 that keep the features.

        Args:
            batch: on which they are computed.
            counts: False to keep nothing.
        """

        def keep(name: str, rows: Tensor, features: Features) -> None:
            if counts:
                indices = torch.tensor(batch.indices)[rows[: len(batch.indices)].cpu()]
                self._found[name].append((indices, features))

        return [
            _Keeper(o, keep) if isinstance(o, GatheredObjective) and o.gathers else o
            for o in self._objectives
        ]

    def means(self, records: Sequence[int], size: int, device: torch.device) -> dict[str, float]:
        """Means of the gathered objectives, by name. Every process must call it.

        Each objective compares the held-out records in groups, as training does: the first `size`
        of them, the next `size`, and so on. So the means depend neither on micro-batches nor on
        processes.

        Args:
            records: indices of all held-out records.
            size: records of a step.
            device: of the engine.
        """
        group = {index: number // size for number, index in enumerate(records)}
        found = {}
        for objective in self._objectives:
            if objective.name in self._found and isinstance(objective, GatheredObjective):
                kept = self._found[objective.name]
                found[objective.name] = _mean_over_groups(objective, kept, group, device)
        return found


def _mean_over_groups(
    objective: GatheredObjective,
    kept: Sequence[tuple[Tensor, Features]],
    group: Mapping[int, int],
    device: torch.device,
) -> float:
    """The loss per record, over the groups that have at least two records; 0 if none has."""
    nothing = torch.zeros(0, device=device)
    own = Features.joined([Features(nothing, nothing), *(features for _, features in kept)])
    indices = torch.cat([nothing.long(), *(i.to(device) for i, _ in kept)])
    features, order = own.gathered(), distributed.gather_rows(indices).tolist()
    members: dict[int, list[int]] = {}
    for place in sorted(range(len(order)), key=order.__getitem__):
        members.setdefault(group[order[place]], []).append(place)
    compared = [places for places in members.values() if len(places) > 1]
    total = sum(
        float(objective.compare(Features(features.student[p], features.teacher[p])))
        for p in compared
    )
    return total / max(sum(map(len, compared)), 1)


class _Keeper(Objective):
    """Takes the place of a gathered objective, and passes its features to a function."""

    config_class = ObjectiveConfig

    def __init__(self, objective: GatheredObjective, keep: Callable[[str, Tensor, Features], None]):
        super().__init__(objective.config)
        self.teacher, self.sources = objective.teacher, objective.sources
        self.objective, self.keep = objective, keep

    def rows(self, targets: Targets) -> Tensor:
        return self.objective.rows(targets)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        features = self.objective.features_of(student, teacher, targets)
        self.keep(self.name, self.rows(targets).any(1), features)
        return Outcome(0 * features.student.sum())
