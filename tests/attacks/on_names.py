"""Names that are used in paths, and labels with a reserved meaning."""

from pathlib import Path

from tests.attacks.code import TASK, task
from tests.attacks.table import add, attack, by_recipe

THEME = "paths"


for name, value in {
    "name_of_the_parent": "..",
    "name_of_the_folder": ".",
    "name_of_dots": "...",
    "name_with_a_path": "../up",
    "name_with_a_folder": "a/b",
    "name_of_a_root": "/tmp",
    "name_with_a_backslash": "..\\up",
    "name_with_a_row": "a\nb",
    "name_of_home": "~",
}.items():
    by_recipe(THEME, name, f"named a run {value!r}", {"name": value}, "recipe.yaml: ", "name")


def labelled(name, label, *parts):
    """An attack by a variant's label."""

    def prepare(world):
        world.teach()
        world.raw["variants"] = {label: []}

    add(THEME, name, f"called a variant `{label}`", ("recipe.yaml", *parts), prepare)


for reserved in ("evaluation", "release", "replaced", "tensorboard", "wandb", "trackio"):
    labelled(f"label_{reserved}", reserved, f"the label '{reserved}', which a folder of the run")
labelled("label_of_a_start", "00-start", "a folder of the run")
labelled("label_of_a_stage", "01-mimic", "a folder of the run")
labelled("label_of_the_teacher", "teacher", "which its teacher's scores have")
labelled("label_of_the_parent", "..", "variants")
labelled("label_with_a_path", "../../up", "variants")


@attack(THEME, "labelled the student `teacher`", "which its teacher's scores have")
def own_label_of_the_teacher(world):
    world.teach()
    world.raw["label"] = "teacher"


@attack(THEME, "gave one seed twice", "two seeds are the same")
def seed_twice(world):
    world.raw["seeds"] = [1, 1]


@attack(THEME, "had a run write over the user's recipe", "a recipe.yaml that no run has written")
def recipe_written_over(world):
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text("name: mine  # my own notes\n")
    world.raw |= {"output_dir": ".", "name": "mine"}


@attack(THEME, "named a task by a path", "the task's name '../../up'")
def task_named_by_a_path(world):
    task(world, TASK.replace("task: scenes_pope", "task: ../../up"))
    world.raw["evaluate"]["tasks"] = ["../../up"]
