"""The Hub, and words of commands other than `mmkd run`."""

import os
import shutil
from pathlib import Path

import huggingface_hub

from mmkd.data.score_file import write_scores
from tests.support.bad_inputs.evaluations import task_folder
from tests.support.bad_inputs.table import World, case, overridden
from tests.support.hub_server import TOKEN

HUB = "hub"
COMMAND = "command"
RELEASE = ["release", "runs/tiny", "--repo", "me/student"]
RELEASED = "runs/tiny/release"


@case(HUB, "released while HF_HUB_OFFLINE is set", "me/student: cannot upload", "unset it")
def release_offline(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    return RELEASE


@case(HUB, "released without logging in", "nobody is logged in", "hf auth login")
def release_of_nobody(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.hub()
    world.patch.setenv("HF_TOKEN", "")
    world.patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(world.folder / "none"))
    return RELEASE


@case(
    HUB,
    "released with a wrong token",
    "me/student: cannot create the repository (401 Invalid",
    "log in with 'hf auth login'",
    leaves=RELEASED,
)
def release_with_a_wrong_token(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.hub()
    world.patch.setenv("HF_TOKEN", TOKEN.replace("a", "b"))
    return RELEASE


@case(
    HUB,
    "released to a repository of somebody else",
    "cannot create the repository (403",
    "hf auth login",
    leaves=RELEASED,
)
def release_to_another(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.hub().fail("POST /api/repos/create", 403)
    return RELEASE


@case(
    HUB,
    "released to a repository that was deleted meanwhile",
    "cannot upload (404",
    "check the repository",
    leaves=RELEASED,
)
def release_to_what_is_gone(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.hub().fail("preupload", 404)
    return RELEASE


@case(
    HUB,
    "released while the Hub was down",
    "cannot create the repository (503",
    "same command again",
    leaves=RELEASED,
)
def release_to_a_hub_that_is_down(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.hub().fail("POST /api/repos/create", 503, times=99)
    world.patch.setattr("time.sleep", lambda seconds: None)
    return RELEASE


@case(
    HUB,
    "named a license that the Hub does not know",
    "the Hub refuses the card's metadata",
    "correct license",
    leaves=RELEASED,
)
def release_under_no_license(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.hub()
    return [*RELEASE, "license=none-of-these"]


@case(HUB, "named a model that the Hub does not have", "me/nothing: no such", "check the path")
def model_that_the_hub_has_not(world: World) -> None:
    world.hub()
    world.raw["student"] = {"model": "me/nothing"}


overridden(
    HUB,
    "data_set_offline",
    "data.train=hub:me/nothing",
    "hub:me/nothing: cannot load the data set",
    "HF_HUB_OFFLINE",
)


# Commands


@case(
    COMMAND,
    "`mmkd release` of another folder",
    "model: not a run: it has no recipe.yaml",
    "runs/NAME",
)
def release_of_no_run(world: World) -> list[str]:
    return ["release", "model", "--repo", "me/student"]


@case(
    COMMAND,
    "`mmkd release` of a run that is not finished",
    "runs/tiny: student is not finished",
    "run its recipe again",
)
def release_of_an_unfinished_run(world: World) -> list[str]:
    world.take(world.given.stopped, "runs")
    return RELEASE


@case(
    COMMAND,
    "`mmkd release` of an unknown student",
    "the run has trained no student 'large'",
    "it has student",
)
def release_of_an_unknown_student(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    return [*RELEASE, "--student", "large"]


@case(
    COMMAND,
    "`mmkd release` without a repository",
    "release.repo: no repository is named",
    "--out DIR",
)
def release_to_nowhere(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    return RELEASE[:2]


@case(
    COMMAND,
    "`mmkd release` of a student that is gone",
    "the student of stage 01-mimic is gone",
    "train it again",
)
def release_of_a_student_that_is_gone(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    shutil.rmtree("runs/tiny/01-mimic/student")
    return RELEASE


@case(
    COMMAND,
    "`mmkd report` of another folder",
    "model: not a run: it has no recipe.yaml",
    "runs/NAME",
)
def report_of_no_run(world: World) -> list[str]:
    return ["report", "model"]


@case(COMMAND, "`mmkd report` of a run with a broken recipe", "runs/tiny/recipe.yaml", "not YAML")
def report_of_a_broken_run(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    Path("runs/tiny/recipe.yaml").write_text("name: [")
    return ["report", "runs/tiny"]


@case(COMMAND, "`mmkd cache stats` of another folder", "model: the teacher's cache is not there")
def stats_of_no_cache(world: World) -> list[str]:
    return ["cache", "stats", "model"]


@case(COMMAND, "`mmkd calibrate` without a teacher", "there is no teacher to calibrate", "add 'mo")
def calibrate_no_teacher(world: World) -> list[str]:
    return ["calibrate", "recipe.yaml"]


@case(
    COMMAND,
    "`mmkd calibrate` of a cache without the teacher's weights",
    "a cache has no logits of other records",
    "add 'model'",
)
def calibrate_a_cache(world: World) -> list[str]:
    world.cache()
    del world.raw["teacher"]["model"]
    return ["calibrate", "recipe.yaml"]


@case(
    COMMAND,
    "`mmkd calibrate` without held-out records",
    "no records are held out",
    "--data FILE",
)
def calibrate_on_nothing(world: World) -> list[str]:
    world.teach()
    return ["calibrate", "recipe.yaml"]


@case(
    COMMAND,
    "`mmkd calibrate` of another folder",
    "model/recipe.yaml: no such recipe file",
    "check the path",
)
def calibrate_no_run(world: World) -> list[str]:
    return ["calibrate", "model"]


@case(
    COMMAND,
    "`mmkd label-weight` of two equal students",
    "model and model: there is no best weight: both models give every token the same probability",
    "one with ce and one with kl",
)
def label_weight_of_equal_students(world: World) -> list[str]:
    return ["label-weight", "recipe.yaml", "model", "model", "--data", "records.json"]


@case(
    COMMAND,
    "`mmkd label-weight` without held-out records",
    "no records are held out",
    "--data FILE",
)
def label_weight_on_nothing(world: World) -> list[str]:
    return ["label-weight", "recipe.yaml", "model", "teacher"]


@case(
    COMMAND,
    "`mmkd label-weight` of a folder without a student",
    "empty: the folder holds no processor",
    "give a folder",
)
def label_weight_of_no_student(world: World) -> list[str]:
    Path("empty").mkdir()
    return ["label-weight", "recipe.yaml", "model", "empty", "--data", "records.json"]


@case(
    COMMAND,
    "`mmkd label-weight` of labels without a run",
    "kd: no such folder, and only a run has students with labels",
    "in place of the recipe",
)
def label_weight_without_a_run(world: World) -> list[str]:
    return ["label-weight", "recipe.yaml", "model", "kd"]


@case(
    COMMAND,
    "`mmkd label-weight` of an unknown student",
    "the run has no student 'large'",
    "known: student",
)
def label_weight_of_an_unknown_student(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    return ["label-weight", "runs/tiny", "student", "large"]


@case(
    COMMAND,
    "`mmkd convert` into a folder that exists",
    "teacher: it is there already",
    "name a new folder",
)
def convert_into_a_folder(world: World) -> list[str]:
    return ["convert", "model", "--out", "teacher", "--keep-attention", "none"]


@case(
    COMMAND,
    "`mmkd convert` with an unreadable selection of layers",
    "cannot read 'often'",
    "every:4",
)
def convert_with_unreadable_layers(world: World) -> list[str]:
    return ["convert", "model", "--out", "hybrid", "--keep-attention", "often"]


@case(
    COMMAND,
    "`mmkd convert` without saying which layers",
    "give either 'keep_attention' or 'layers'",
)
def convert_of_no_layers(world: World) -> list[str]:
    return ["convert", "model", "--out", "hybrid"]


@case(COMMAND, "`mmkd convert` of weights that were cut", "model: cannot load the model", "copy")
def convert_cut_weights(world: World) -> list[str]:
    os.truncate("model/model.safetensors", 2000)
    return ["convert", "model", "--out", "hybrid", "--keep-attention", "none"]


@case(COMMAND, "`mmkd eval` of an unknown task", "unknown task 'scenes_pop'", "did you mean")
def unknown_task(world: World) -> list[str]:
    task_folder()
    return ["eval", "model", "--tasks", "scenes_pop", "--include", "tasks", "--out", "scores"]


@case(
    COMMAND, "`mmkd eval` with no folder of tasks", "tasks: no such folder of tasks", "DATA/tasks"
)
def no_task_folder(world: World) -> list[str]:
    return ["eval", "model", "--tasks", "scenes_pope", "--include", "tasks"]


@case(
    COMMAND,
    "`mmkd data check` of a file that is not there",
    "none.json: no such data file",
    "check",
)
def check_of_no_data(world: World) -> list[str]:
    return ["data", "check", "none.json"]


@case(
    COMMAND,
    "`mmkd data check` of a recipe, with --images",
    "recipe.yaml: --images is for a file",
    "leave",
)
def check_with_images_of_a_recipe(world: World) -> list[str]:
    return ["data", "check", "recipe.yaml", "--images", "images"]


@case(COMMAND, "`mmkd data pairs` of data without objects", "records.json", "objects")
def pairs_without_objects(world: World) -> list[str]:
    return ["data", "pairs", "model", "--data", "records.json", "--out", "pairs.parquet"]


@case(
    COMMAND, "`mmkd data build` of an unknown data set", "unknown data set 'scene'", "known: scenes"
)
def build_of_no_data_set(world: World) -> list[str]:
    return ["data", "build", "scene", "--out", "made"]


@case(COMMAND, "`mmkd data show` of another folder", "model: ", "mmkd data build scenes")
def show_of_no_data_set(world: World) -> list[str]:
    return ["data", "show", "model"]


@case(
    COMMAND, "`mmkd init` of an unknown method", "no method 'llava-kd'", "did you mean 'llava_kd'?"
)
def unknown_method(world: World) -> list[str]:
    return ["init", "llava-kd"]


@case(
    COMMAND,
    "`mmkd init` with a folder that is not there",
    "--teacher models/nowhere/teacher: no such model folder, and no Hub id",
    "check the path",
)
def starter_of_no_folder(world: World) -> list[str]:
    words = ["init", "kd", "--student", "org/student", "--data", "train.json"]
    return [*words, "--teacher", "models/nowhere/teacher", "--out", "new.yaml"]


@case(COMMAND, "`mmkd plan` without its data", "none.json: no such data file", "check data.train")
def plan_of_no_data(world: World) -> list[str]:
    return ["plan", "recipe.yaml", "data.train=none.json"]


@case(COMMAND, "`mmkd bench` of an unknown stage", "mimick", "mimic")
def bench_of_no_stage(world: World) -> list[str]:
    return ["bench", "recipe.yaml", "--stage", "mimick"]


@case(
    COMMAND,
    "`mmkd plan` of a model that is not there",
    "nowhere: no such model folder",
    "give a folder",
)
def plan_of_no_model(world: World) -> list[str]:
    world.raw["student"] = {"model": "nowhere"}
    return ["plan", "recipe.yaml"]


@case(COMMAND, "`--plugin` with a file that is not there", "--plugin own.py: no such file", "check")
def no_plugin(world: World) -> list[str]:
    return ["run", "recipe.yaml", "--plugin", "own.py"]


@case(
    COMMAND,
    "`--plugin` with a file that fails",
    "--plugin own.py: it cannot be loaded",
    "ZeroDivisionError",
    "fix it",
)
def plugin_that_fails(world: World) -> list[str]:
    Path("own.py").write_text("1 / 0\n")
    return ["run", "recipe.yaml", "--plugin", "own.py"]


@case(
    COMMAND,
    "scored records with a teacher that the recipe does not have",
    "--model: no model 'teachr'",
    "known: student",
)
def score_with_an_unknown_model(world: World) -> list[str]:
    return ["data", "score", "recipe.yaml", "--out", "s.parquet", "--model", "teachr"]


@case(
    COMMAND,
    "scored records into a file that is there",
    "old.parquet: it is there already",
    "name a new file, or delete this one",
)
def score_into_a_file(world: World) -> list[str]:
    Path("old.parquet").touch()
    return ["data", "score", "recipe.yaml", "--out", "old.parquet", "--device", "cpu"]


@case(COMMAND, "asked for a sheet of no clusters", "--sheet shows clusters", "add --clusters")
def sheet_without_clusters(world: World) -> list[str]:
    return ["data", "score", "recipe.yaml", "--out", "s.parquet", "--sheet", "s.png"]


@case(
    COMMAND,
    "asked for more clusters than there are different images",
    "--clusters: the images cannot be sorted into 2 clusters: fewer are different, 1",
    "ask for fewer",
    leaves="s.parquet.parts",
)
def too_many_clusters(world: World) -> list[str]:
    return ["data", "score", "recipe.yaml", "--out", "s.parquet", "--clusters", "2"]


@case(
    COMMAND,
    "selected clusters of a file of scores without any",
    "s.parquet: it has no clusters",
    "mmkd data score RECIPE --out FILE --clusters K",
)
def no_clusters(world: World) -> None:
    records = [("r1", "records", 0, None)]
    facts = {"sources": {"records": {"records": 1}}, "models": {}}
    write_scores(Path("s.parquet"), records, {}, facts)
    world.raw["data"]["select"] = {"kind": "cluster", "scores": "s.parquet", "part": 0}
