"""Rounds of a stage (`stages[].rounds`): the stages that a run trains for it."""

from collections.abc import Sequence

from mmkd.errors import HINT
from mmkd.recipe.stages import StageConfig
from mmkd.runtime.fields import NAME

MOST_STAGES = 1000


def with_rounds(stages: Sequence[StageConfig]) -> list[StageConfig]:
    """The stages with `NAME-1` to `NAME-N` in place of each stage NAME of N > 1 rounds.

    A conversion comes before the first round. A stage whose teacher is the student after a stage
    with rounds has the student after the last one.

    Args:
        stages: of a recipe.

    Raises:
        ValueError: there are too many, or a name becomes too long.
    """
    last = {s.name: round_name(s, s.rounds) for s in stages}
    found: list[StageConfig] = []
    for stage in stages:
        teacher = stage.teacher
        if teacher is not None and teacher.stage is not None:
            name = last.get(teacher.stage, teacher.stage)
            teacher = teacher.model_copy(update={"stage": name})
        for number in range(1, stage.rounds + 1):
            convert = stage.convert if number == 1 else []
            update = {"name": round_name(stage, number), "convert": convert, "teacher": teacher}
            found.append(stage.model_copy(update={**update, "rounds": 1}))
    for stage in found:
        if len(stage.name) > NAME:
            raise ValueError(
                f"stage {stage.name}: its name with the number of the round has more than {NAME} "
                f"characters{HINT}shorten it"
            )
    if len(found) > MOST_STAGES:
        raise ValueError(
            f"{len(found):,} stages, counting each round{HINT}give at most {MOST_STAGES:,}"
        )
    return found


def round_numbers(stages: Sequence[StageConfig]) -> tuple[int, ...]:
    """For each stage of `with_rounds`, the number of its round, from 1."""
    return tuple(number for stage in stages for number in range(1, stage.rounds + 1))


def round_name(stage: StageConfig, number: int) -> str:
    """The name of a round; `number` counts from 1."""
    return stage.name if stage.rounds == 1 else f"{stage.name}-{number}"
