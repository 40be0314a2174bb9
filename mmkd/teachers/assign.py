"""Assign objectives to several teachers: an objective on outputs becomes one objective per teacher.

    L = sum_j w_j 1/|M_j| sum_{t in M_j} D(p_j, q)

M_j are the tokens of the records of teacher j's data sources. The mean is taken for each teacher
separately, so it does not depend on the sizes of the sources. With a stage's `ensemble`, weights
depend on the token (`mmkd.objectives.ensemble`). If the objective has data sources of its own, M_j
are the tokens of the records of both.
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
    """Limit each objective to its data sources, and copy each objective on outputs for each teacher
    with the teacher's weight and sources. Other objectives use the first teacher.

    A copy whose objective and teacher have no data source in common is left out.

    Args:
        objectives: of a stage.
        teachers: of the recipe, the primary one first.
        data: of the stage.
        ensemble: of the stage, how it weighs the teachers.

    Raises:
        RecipeError: a teacher or an objective names an unknown data source, or an objective has no
            data source in common with any teacher.
    """
    objectives = [limit_to_sources(o, data) for o in objectives]
    if len(teachers) < 2 and not any(t.sources or t.weight != 1 for t in teachers):
        return objectives
    members = tuple(
        Member(t.name, t.weight, _indices(t.sources, data, f"teacher {t.name}: sources"))
        for t in teachers
    )
    whole = None if ensemble is None else Ensemble(members, ensemble.normalize, ensemble.kappa)
    made: list[Objective] = []
    for objective in objectives:
        if not objective.config.compares_outputs:
            made.append(objective)
            continue
        covered = {m.name: _both(objective.sources, m.sources) for m in members}
        if all(sources is not None and not sources for sources in covered.values()):
            raise RecipeError(
                "it has no data source in common with its teacher",
                where=f"objective {objective.name}: sources",
                hint="add a source of 'teacher.sources', or leave one of the two out",
            )
        for member in members:
            sources = covered[member.name]
            if sources is not None and not sources:
                continue
            weight, rows = member.weight, whole
            if whole is not None and whole.is_static:
                weight, rows = whole.static_weight(weight), None
            made.append(objective.for_teacher(member.name, weight, sources, rows))
    return made


def limit_to_sources(objective: Objective, data: DataConfig) -> Objective:
    """The objective, limited to the records of its `sources` if it names any.

    Args:
        objective: of a stage.
        data: of the stage.

    Raises:
        RecipeError: it names an unknown data source.
    """
    where = f"objective {objective.name}: sources"
    sources = _indices(objective.config.sources, data, where)
    return objective if sources is None else objective.for_sources(sources)


def _both(first: frozenset[int] | None, second: frozenset[int] | None) -> frozenset[int] | None:
    """The data sources that two sets have in common; None is the set of all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


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


def _indices(names: Sequence[str], data: DataConfig, where: str) -> frozenset[int] | None:
    """Indices of data sources; None, for all, if there are no names."""
    labels = [part.label for part in data.parts]
    for name in names:
        if name not in labels:
            hint = nearest(name, labels)
            raise RecipeError(f"no data source {name!r}", where=where, hint=hint)
    return frozenset(map(labels.index, names)) or None
