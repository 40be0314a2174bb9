"""`mmkd init`: recipes that a newcomer can read, with the stages of those in configs/."""

import re
import tomllib
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mmkd.commands.starters import METHODS, SCENES, Choices, missing_files, starter, write_starter
from mmkd.errors import MmkdError
from mmkd.recipe import Recipe, load_recipe
from mmkd.runs import preflight
from tests.support import warm
from tests.support.places import ROOT

PUBLISHED = {
    "llava_kd": "llava_kd/llava_onevision.yaml",
    "llava_mod": "llava_mod/qwen3_vl.yaml",
    "matvlm": "matvlm/mamba_25.yaml",
    "mmmamba": "mmmamba/linear.yaml",
    "preference": "llava_mod/preference.yaml",
    "unlabelled": "unlabelled.yaml",
}
MADE = {"answers": "data/made/answers.jsonl", "questions": "data/made/questions.jsonl"}
HUB = Choices(teacher="org/large", student="org/small", data="train.json", images="pictures")


def choices(method, **changes):
    pairs = "pairs.parquet" if METHODS[method].pairs else None
    own = {"data": None, "images": "pictures"} if METHODS[method].makes else {}
    return Choices(**{**vars(HUB), "pairs": pairs, **changes, **own})


def loaded(method, **changes):
    return load_recipe(yaml.safe_load(starter(method, choices(method, **changes), Path("r.yaml"))))


def published(method):
    if method == "kd":
        text = (ROOT / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1]
        return load_recipe(yaml.safe_load(text.split("```")[0]))
    if method == "sparse":
        whole = load_recipe(ROOT / "configs" / PUBLISHED["llava_mod"])
        (stage,) = (s for s in whole.stages if s.name == "d2s")
        evaluation = whole.evaluate.model_copy(update={"every_stage": False})
        return whole.model_copy(update={"stages": [stage], "evaluate": evaluation})
    return load_recipe(ROOT / "configs" / PUBLISHED[method])


def without_choices(recipe: Recipe):
    """A recipe without its name and what `mmkd init` is told."""
    raw = recipe.model_dump(mode="json", exclude={"name"})
    for role in ("teacher", "student"):
        del raw[role]["model"]
    for part in (raw, *raw["stages"]):
        for key in ("train", "images"):
            (part["data"] or {}).pop(key, None)
    for stage in raw["stages"]:
        del stage["data"]
    for made in raw["make"].values():
        del made["pictures"]
    return raw


@pytest.mark.parametrize("method", METHODS)
def test_a_starter_is_the_published_recipe_with_other_models_and_data(method):
    recipe = loaded(method)
    assert without_choices(recipe) == without_choices(published(method))
    assert (recipe.teacher.model, recipe.student.model) == ("org/large", "org/small")
    if METHODS[method].makes:
        assert {name: made.out for name, made in recipe.make.items()} == MADE
        assert {made.pictures for made in recipe.make.values()} == {"pictures"}
        assert recipe.data.train == MADE["answers"]
        return
    assert (recipe.data.train, recipe.data.images) == ("train.json", "pictures")
    assert loaded(method, images=None).data.images is None


def test_the_comment_beside_the_data_says_what_they_are():
    for method, about in METHODS.items():
        if about.makes:
            continue
        (line,) = (
            line
            for line in starter(method, choices(method), Path("r.yaml")).splitlines()
            if line.startswith("  train: train.json")
        )
        assert ("pairs of a chosen" in line) is (method == "preference")
        assert ("LLaVA conversations" in line) is (method != "preference")


def test_preferences_train_on_the_pairs():
    assert [s.data and s.data.train for s in loaded("llava_mod").stages] == [
        None, None, None, "pairs.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_starter_passes_what_a_run_begins_with(method, tiny_model_dir, scenes_dir):
    pairs = str(scenes_dir / "preferences.parquet")
    recipe = loaded(
        method,
        teacher=str(tiny_model_dir),
        student=str(tiny_model_dir),
        data=pairs if method == "preference" else str(scenes_dir / "train.parquet"),
        images=None,
        pairs=pairs if METHODS[method].pairs else None,
    )
    preflight.check(recipe, data=not METHODS[method].makes)


@pytest.mark.parametrize("method", METHODS)
def test_every_key_is_explained_where_it_first_stands(method):
    text = starter(method, choices(method), Path("my recipe.yaml"))
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert "#   mmkd plan 'my recipe.yaml' " in text
    assert "#   mmkd run 'my recipe.yaml' " in text
    seen = set()
    for before, line in pairwise(lines):
        found = re.match(r"[ -]*(\w+):", line)
        if found and found.group(1) not in seen:
            assert "  # " in line or before.strip().startswith("#"), line
            seen.add(found.group(1))
    assert {"teacher", "student", "data", "stages", "train", "optimizer", "tasks"} <= seen


@pytest.mark.parametrize("method", METHODS)
def test_a_starter_fits_a_screen(method):
    lines = starter(method, choices(method), Path("recipe.yaml")).splitlines()
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("text", ["a b.json", "1e3", "true", "~", 'say "hi": #1', "ünï", "{x}"])
def test_names_are_read_back_as_they_were_given(text):
    recipe = loaded("kd", teacher=text, data=text, images=text)
    assert (recipe.teacher.model, recipe.data.train, recipe.data.images) == (text, text, text)


def test_a_students_model_is_the_teachers_where_the_method_says_so():
    for method, about in METHODS.items():
        if about.one_model:
            assert loaded(method, student=None).student.model == "org/large"
            continue
        with pytest.raises(MmkdError, match=f"{method} needs --student -- mmkd init {method} "):
            loaded(method, student=None)


def test_what_is_missing_is_named_with_the_command():
    with pytest.raises(MmkdError) as error:
        starter("llava_mod", Choices(teacher="t"), Path("r.yaml"))
    assert str(error.value) == (
        "llava_mod needs --student, --data, --pairs -- mmkd init llava_mod --teacher TEACHER "
        "--student STUDENT --data DATA --pairs PAIRS"
    )
    with pytest.raises(MmkdError, match="kd takes no --pairs"):
        starter("kd", choices("kd", pairs="p.parquet"), Path("r.yaml"))


def test_a_file_that_is_there_stays(tmp_path):
    out = tmp_path / "recipe.yaml"
    write_starter("kd", choices("kd"), out)
    written = out.read_text()
    assert load_recipe(out).stages[1].name == "mimic"
    with pytest.raises(MmkdError, match=r"recipe.yaml: it is there already -- .*--out"):
        write_starter("sparse", choices("sparse"), out)
    assert out.read_text() == written
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_is_written_of_a_method_that_there_is_not(tmp_path):
    with pytest.raises(MmkdError, match="no method 'llava-kd' -- did you mean 'llava_kd'"):
        write_starter("llava-kd", HUB, tmp_path / "recipe.yaml")
    assert list(tmp_path.iterdir()) == []


def mmkd(*words, where):
    return warm.run(*words, cwd=where)


def test_the_version(tmp_path):
    done = mmkd("--version", where=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"mmkd {version('mmkd')}\n")


def test_the_command(tmp_path):
    for words in (["init"], ["init", "--list"]):
        done = mmkd(*words, where=tmp_path)
        names = [line.split()[0] for line in done.stdout.splitlines()]
        assert names == [SCENES, *METHODS, "(Hub)"]
    words = ["init", "matvlm", "--teacher", "org/large", "--data", "train.json"]
    done = mmkd(*words, where=tmp_path)
    assert done.stdout == (
        "wrote recipe.yaml; next: mmkd plan recipe.yaml, then mmkd run recipe.yaml\n"
    )
    assert load_recipe(tmp_path / "recipe.yaml").name == "matvlm"
    again = mmkd(*words, where=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        "mmkd: recipe.yaml: it is there already -- name another file with --out\n"
    )


def test_the_package_brings_its_files():
    """Whatever in mmkd/ is no Python is declared in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["mmkd"]
    package = ROOT / "mmkd"
    declared = {path for pattern in patterns for path in package.glob(pattern)}
    there = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there - declared == set()
    assert {package / "commands" / "starters" / f"{method}.yaml" for method in METHODS} <= declared


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("models/none/here", "no such model folder, and no Hub id -- check the path"),
        ("./none", "no such model folder, and no Hub id"),
        ("/none", "no such model folder, and no Hub id"),
        ("none", "no such model folder, and no Hub id"),
        ("file.txt", "no such model folder, and no Hub id"),
        ("empty", "the folder holds no model -- it needs a config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, monkeypatch, key, model, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").touch()
    Path("good").mkdir()
    Path("good/config.json").write_text("{}")
    given = {**vars(HUB), key: "good"}
    write_starter("kd", Choices(**given), Path("good.yaml"))
    with pytest.raises(MmkdError, match=re.escape(f"--{key} {model}: {said}")):
        write_starter("kd", Choices(**{**given, key: model}), Path("recipe.yaml"))
    assert not Path("recipe.yaml").exists()


def test_data_that_are_not_there_yet_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.json").touch()
    assert missing_files(Choices(data="train.json", images="pictures")) == ["pictures"]
    assert missing_files(Choices(data="hub:a/b", pairs="part-{0..3}.tar")) == []


def test_the_scenes_start_without_the_hub(scenes_dir, tmp_path, monkeypatch):
    """The recipe of the quickstart's student, wherever the command is given."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "recipe.yaml"
    write_starter(SCENES, Choices(data=str(scenes_dir)), out)
    recipe = load_recipe(out)
    shared = load_recipe(ROOT / "configs" / "scenes" / "base.yaml")
    assert recipe.stages == shared.stages
    assert recipe.student.convert == shared.student.convert
    assert recipe.evaluate.tasks == shared.evaluate.tasks
    assert Path(recipe.teacher.model).samefile(ROOT / "assets" / "scenes_teacher")
    preflight.check(recipe)
    preflight.check_evaluation(recipe.evaluate, recipe.student)
    short = starter(SCENES, Choices(teacher=recipe.teacher.model), Path("recipe.yaml"))
    assert max(len(line) for line in short.splitlines() if recipe.teacher.model not in line) <= 100


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].makes])
def test_an_offline_starter_passes_all_checks_without_the_hub(method, tiny_model_dir, scenes_dir):
    pairs = str(scenes_dir / "preferences.parquet")
    settings = {
        "teacher": str(tiny_model_dir),
        "student": str(tiny_model_dir),
        "data": pairs if method == "preference" else str(scenes_dir / "train.parquet"),
        "images": None,
        "pairs": pairs if METHODS[method].pairs else None,
        "offline": True,
    }
    for held_out in (None, str(scenes_dir / "validation.parquet")):
        text = starter(method, replace(choices(method), **settings, held_out=held_out), Path("r"))
        recipe = load_recipe(yaml.safe_load(text))
        assert recipe.evaluate.tasks == []
        assert recipe.evaluate.samples.records == (held_out or settings["data"])
        preflight.check_evaluation(recipe.evaluate, recipe.student)
    with pytest.raises(MmkdError, match="--teacher: --offline takes folders, and there is no"):
        starter(method, replace(choices(method), offline=True), Path("r"))
    with pytest.raises(MmkdError, match="--held-out is for --offline"):
        starter(method, replace(choices(method), held_out="a.json"), Path("r"))


def test_an_offline_starter_without_text_shows_answers_about_the_images(tiny_model_dir, tmp_path):
    model = str(tiny_model_dir)
    settings = {"teacher": model, "student": model, "images": str(tmp_path), "offline": True}
    recipe = load_recipe(yaml.safe_load(starter("unlabelled", Choices(**settings), Path("r"))))
    assert recipe.evaluate.samples.records is None
    assert recipe.evaluate.samples.images == str(tmp_path)
    with pytest.raises(MmkdError, match="unlabelled takes no --data -- leave it out"):
        starter("unlabelled", Choices(**settings, data="a.json"), Path("r"))
    with pytest.raises(MmkdError, match="unlabelled needs --images -- mmkd init unlabelled"):
        starter("unlabelled", Choices(**{**settings, "images": None}), Path("r"))
