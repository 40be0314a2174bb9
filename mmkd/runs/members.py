"""The members of a run: the assistant, and the recipe and its variants, each once per seed."""

from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from mmkd.recipe import Recipe, TeacherConfig, load_recipe, with_made_names, with_record_names
from mmkd.recipe.rounds import round_numbers
from mmkd.runtime.run_folder import ASSISTANT, MemberFolder, RunFolder, StageFolder


@dataclass(frozen=True)
class Member:
    """One student of a run: the recipe or one of its variants, with one seed; or the assistant.

    Attributes:
        label: its name in the run.
        recipe: of this student alone.
        folder: of its stages.
        assistant: the member that is its teacher; None if it has another teacher or none.
        numbers: for each stage, the number of its round, from 1; 1 for a stage without rounds.
    """

    label: str
    recipe: Recipe
    folder: MemberFolder
    assistant: "Member | None" = None
    numbers: tuple[int, ...] = ()

    @property
    def untrained_teacher(self) -> Recipe | None:
        """The recipe of its teacher, if that is an assistant that is not trained yet."""
        if self.assistant is None or self.assistant.is_trained():
            return None
        return self.assistant.recipe

    @cached_property
    def stages(self) -> list[StageFolder]:
        """The folders of its stages, in order."""
        return [self.folder.stage(i, s.name) for i, s in enumerate(self.recipe.stages)]

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.stages[-1].student

    def later_rounds(self, index: int) -> range:
        """The indices of a stage and of the rounds after it, if it is a round after the first one;
        otherwise none."""
        numbers = self.numbers
        if numbers[index] == 1:
            return range(0)
        more = takewhile(lambda number: number > 1, numbers[index:])
        return range(index, index + len(list(more)))

    def is_trained(self) -> bool:
        """Whether all its stages are finished; raises as `StageFolder.is_done`."""
        return all(stage.is_done() for stage in self.stages)


def run_folder(recipe: Recipe) -> RunFolder:
    return RunFolder(Path(recipe.output_dir) / recipe.name)


def members(recipe: Recipe) -> list[Member]:
    """The assistant, if there is one, and the students, in the order in which they are trained."""
    assistant = _assistant(recipe)
    return [*([] if assistant is None else [assistant]), *students(recipe)]


def students(recipe: Recipe) -> list[Member]:
    """The recipe and its variants, each once per seed, in a fixed order. If there is an assistant,
    it is their teacher, unless a variant names another one."""
    alone = not recipe.variants and not recipe.seeds
    run, assistant = run_folder(recipe), _assistant(recipe)
    found = []
    for seed in recipe.seeds or [recipe.seed]:
        for label, overrides in {recipe.label: [], **recipe.variants}.items():
            raw = recipe.model_dump(mode="json")
            raw |= {"variants": {}, "seeds": [], "evaluate": None, "release": None}
            raw |= {"seed": seed, "label": label, "assistant": None}
            raw |= _with_made_names(raw, recipe)
            if assistant is not None:
                raw["teacher"] = _as_teacher(assistant, recipe).model_dump(mode="json")
            name = f"{label}-seed{seed}" if recipe.seeds else label
            folder = run.only_member if alone else run.member(name)
            written = load_recipe(raw, overrides)
            own = _trained(written, recipe)
            teacher = assistant if _teaches(assistant, own) else None
            found.append(Member(name, own, folder, teacher, round_numbers(written.stages)))
    return found


def _with_made_names(raw: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What reads the files of `make` in a written recipe, with their names instead."""

    def named(part: dict[str, Any]) -> dict[str, Any]:
        own = part["data"]
        return part if own is None else {**part, "data": with_made_names(own, recipe.make)}

    return {
        "make": with_record_names(raw["make"], recipe.make),
        "data": named(raw)["data"],
        "stages": [named(stage) for stage in raw["stages"]],
    }


def _assistant(recipe: Recipe) -> Member | None:
    """The assistant as a member. It is trained with the recipe's teacher and `seed`."""
    if recipe.assistant is None:
        return None
    raw = recipe.model_dump(mode="json")
    own = {key: value for key, value in raw["assistant"].items() if value is not None}
    raw |= {"variants": {}, "seeds": [], "evaluate": None, "release": None, "assistant": None}
    written = load_recipe({**raw, **own, "label": ASSISTANT})
    return Member(
        ASSISTANT,
        _trained(written, recipe),
        run_folder(recipe).member(ASSISTANT),
        numbers=round_numbers(written.stages),
    )


def _trained(written: Recipe, recipe: Recipe) -> Recipe:
    """The recipe of a member: each round is a stage, and `evaluate` of the run says where tasks of
    `make` are."""
    return written.with_rounds().model_copy(update={"evaluate": recipe.evaluate})


def _as_teacher(assistant: Member, recipe: Recipe) -> TeacherConfig:
    """The finished assistant as a teacher."""
    made = assistant.recipe.student
    return TeacherConfig(
        model=str(assistant.student),
        dtype=made.dtype,
        attn_implementation=made.attn_implementation,
        placement="auto" if recipe.teacher is None else recipe.teacher.placement,
    )


def _teaches(assistant: Member | None, recipe: Recipe) -> bool:
    teacher = recipe.teacher
    return assistant is not None and teacher is not None and teacher.model == str(assistant.student)
