"""Assign objectives to several teachers: an objective on outputs becomes one objective per teacher.

    L = sum_j w_j 1/|M_j| sum_{t in M_j} D(p_j, q)

M_j are the tokens of the records of teacher j's data sources. The mean is taken for each teacher
separately, so it does not depend on the sizes of the sources. With a stage's `ensemble`, weights
depend on the token (`mmkd.objectives.ensemble`).
"""

from collections.abc import Sequence

from mmkd.errors import RecipeError, nearest
from mmkd.objectives import Objective, ObjectiveConfig, Preference
from mmkd.objectives.ensemble import Ensemble, Member
from mmkd.recipe import DataConfig, EnsembleConfig, TeacherConfig


def ask_each(
    objectives: Sequence[Objective],
    teachers: Sequence[TeacherConfig],
    data: DataConfig,
    ensemble: EnsembleConfig | None = None,
) -> list[Objective]:
    """Copy each objective on outputs for each teacher, with the teacher's weight and sources. Other
    objectives stay unchanged and use the first teacher.

    Args:
        objectives: of a stage.
        teachers: of the recipe, the primary one first.
        data: of the stage.
        ensemble: of the stage, how it weighs the teachers.

    Raises:
        RecipeError: a teacher names an unknown data source.
    """
    if len(teachers) < 2 and not any(t.sources or t.weight != 1 for t in teachers):
        return list(objectives)
    members = tuple(Member(t.name, t.weight, _numbers(t, data)) for t in teachers)
    whole = None if ensemble is None else Ensemble(members, ensemble.normalize, ensemble.kappa)
    made: list[Objective] = []
    for objective in objectives:
        if not objective.config.compares_outputs:
            made.append(objective)
            continue
        for member in members:
            weight, rows = member.weight, whole
            if whole is not None and whole.is_static:
                weight, rows = whole.static_weight(weight), None
            made.append(objective.for_teacher(member.name, weight, member.sources, rows))
    return made


def compares(objective: Objective) -> bool:
    """Whether an objective compares signals of a teacher. A preference objective only needs
    log-probabilities of its reference."""
    return "teacher" in objective.needs and not isinstance(objective, Preference)


def reads_layers_only(objective: Objective) -> bool:
    """Whether an objective reads a teacher's decoder layers, and neither its final hidden states
    nor its head's output."""
    needs = objective.needs
    return "layers" in needs and "distribution" not in needs and not objective.reads_hidden


def needed_teachers(
    teachers: Sequence[TeacherConfig], objectives: Sequence[ObjectiveConfig]
) -> list[TeacherConfig]:
    """The teachers that objectives need: all if an objective compares outputs, only the first if
    objectives need other signals of a teacher.

    Args:
        teachers: of a recipe, the primary one first.
        objectives: as the recipe has them.
    """
    if any(o.compares_outputs for o in objectives):
        return list(teachers)
    return list(teachers[:1]) if any("teacher" in o.needs for o in objectives) else []


def _numbers(teacher: TeacherConfig, data: DataConfig) -> frozenset[int] | None:
    """Indices of the data sources on which a teacher is used; None for all."""
    labels = [part.label for part in data.parts]
    for name in teacher.sources:
        if name not in labels:
            raise RecipeError(
                f"no data source {name!r}",
                where=f"teacher {teacher.name}: sources",
                hint=nearest(name, labels),
            )
    return frozenset(map(labels.index, teacher.sources)) or None
