"""The members of a run: the recipe and its variants, each once per seed."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmkd.recipe import Recipe, load_recipe
from mmkd.runtime.run_folder import MemberFolder, RunFolder, StageFolder


@dataclass(frozen=True)
class Member:
    """One student of a run: the recipe or one of its variants, with one seed."""

    label: str
    recipe: Recipe
    folder: MemberFolder

    @cached_property
    def stages(self) -> list[StageFolder]:
        """The folders of its stages, in order."""
        return [self.folder.stage(i, s.name) for i, s in enumerate(self.recipe.stages)]

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.stages[-1].student

    def is_trained(self) -> bool:
        """Whether all its stages are finished; raises as `StageFolder.is_done`."""
        return all(stage.is_done() for stage in self.stages)


def run_folder(recipe: Recipe) -> RunFolder:
    return RunFolder(Path(recipe.output_dir) / recipe.name)


def members(recipe: Recipe) -> list[Member]:
    """The recipe and its variants, each once per seed, in a fixed order."""
    alone = not recipe.variants and not recipe.seeds
    run = run_folder(recipe)
    found = []
    for seed in recipe.seeds or [recipe.seed]:
        for label, overrides in {recipe.label: [], **recipe.variants}.items():
            raw = recipe.model_dump(mode="json")
            raw |= {"variants": {}, "seeds": [], "evaluate": None, "release": None}
            raw |= {"seed": seed, "label": label}
            name = f"{label}-seed{seed}" if recipe.seeds else label
            folder = run.only_member if alone else run.member(name)
            found.append(Member(name, load_recipe(raw, overrides), folder))
    return found
