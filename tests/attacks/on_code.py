"""Folders and recipes that try to run code. Each would write the file `ran`."""

import json
from pathlib import Path

import yaml

from tests.attacks.code import EVIL, NAMED, THEME, tasks
from tests.attacks.table import attack
from tests.support.bad_inputs.table import change_json

CLASSES = {
    "AutoConfig": "own.Own",
    "AutoModelForImageTextToText": "own.Own",
    "AutoProcessor": "own.Own",
    "AutoTokenizer": ["own.Own", "own.Own"],
    "AutoImageProcessor": "own.Own",
}


def change(path, **keys):
    """Set keys of a JSON file."""
    change_json(path, lambda found: found.update(keys))


def bring(folder="model", file="config.json", source="", **keys):
    """Code for a model's folder, and a config that names it."""
    Path(folder, "own.py").write_text(EVIL)
    classes = json.loads(json.dumps(CLASSES).replace("own.Own", f"{source}own.Own"))
    change(f"{folder}/{file}", auto_map=classes, **keys)


def unknown(folder="model", source=""):
    """A model of an architecture that only its own code knows."""
    bring(folder, model_type="own", source=source)


def trusting(world):
    world.raw["student"]["trust_remote_code"] = True


MODEL = ("model: ", f"add {NAMED} model to the command")
TEACHER = ("teacher: ", f"add {NAMED} teacher to the command")


@attack(THEME, "let a recipe trust the student's code", *MODEL)
def recipe_trusts_the_student(world):
    unknown()
    trusting(world)


@attack(THEME, "let a recipe trust the student's code, under `plan`", *MODEL)
def recipe_trusts_the_student_under_plan(world):
    unknown()
    trusting(world)
    return ["plan", "recipe.yaml"]


@attack(THEME, "trusted the student's code by `key=value`", *MODEL)
def override_trusts_the_student(world):
    unknown()
    return ["run", "recipe.yaml", "student.trust_remote_code=true"]


@attack(THEME, "let a recipe trust the teacher's code", *TEACHER)
def recipe_trusts_the_teacher(world):
    world.teach()
    world.raw["teacher"]["trust_remote_code"] = True
    unknown("teacher")


@attack(THEME, "let a variant of a recipe trust code", *MODEL)
def variant_trusts_the_student(world):
    unknown()
    world.raw["variants"] = {"other": ["student.trust_remote_code=true"]}


@attack(THEME, "brought a processor's code", *MODEL)
def code_of_a_processor(world):
    bring(file="processor_config.json", processor_class="Own")
    trusting(world)


@attack(THEME, "brought a processor's code in another folder", "words: ", f"{NAMED} words")
def code_of_another_processor(world):
    Path("words").mkdir()
    for path in Path("model").glob("*"):
        if path.name != "model.safetensors":
            Path("words", path.name).write_bytes(path.read_bytes())
    bring("words", "processor_config.json", processor_class="Own")
    world.raw["student"]["processor"] = "words"
    trusting(world)
    return ["run", "recipe.yaml", NAMED, "model"]


@attack(THEME, "gave consent to another folder's code", *MODEL)
def consent_to_another(world):
    unknown()
    return ["run", "recipe.yaml", NAMED, "teacher"]


@attack(
    THEME,
    "named the code of another folder in a trusted model's config",
    "teacher: its Python code (own.py) may not run",
    f"add {NAMED} teacher",
)
def code_of_another_repository(world):
    unknown("teacher")
    unknown("model", source="teacher--")
    return ["run", "recipe.yaml", NAMED, "model"]


@attack(THEME, "trusted code that a cache's teacher brings", *TEACHER)
def code_of_a_caches_teacher(world):
    world.cache()
    world.raw["teacher"]["trust_remote_code"] = True
    unknown("teacher")
    return ["cache", "recipe.yaml"]


@attack(THEME, "timed a model that brings code", *MODEL)
def code_under_bench(world):
    unknown()
    trusting(world)
    return ["bench", "recipe.yaml"]


@attack(THEME, "looked through the data of a model that brings code", *MODEL)
def code_under_data_check(world):
    bring(file="processor_config.json", processor_class="Own")
    trusting(world)
    return ["data", "check", "recipe.yaml"]


@attack(THEME, "asked a model that brings code for pairs", *MODEL)
def code_under_data_pairs(world):
    unknown()
    row = json.loads(Path("records.json").read_text())[0] | {
        "objects": [{"name": "cat", "box": [0, 0, 9, 9]}]
    }
    world.records(row)
    return ["data", "pairs", "model", "--data", "records.json", "--out", "pairs.parquet"]


@attack(THEME, "converted a model that brings code", *MODEL)
def code_under_convert(world):
    unknown()
    return ["convert", "model", "--layers", "0", "--out", "converted"]


@attack(THEME, "scored a model that brings code", *MODEL)
def code_under_eval(world):
    unknown()
    tasks()
    return ["eval", "model", "--tasks", "scenes_pope", "--include", "tasks"]


def foreign_run(world):
    """A finished run from somebody else, whose student brings code that its recipe trusts."""
    world.take(world.given.trained, "runs")
    (student,) = Path("runs/tiny").glob("*/student")
    unknown(student)
    for path in (Path("runs/tiny/recipe.yaml"), *Path("runs/tiny").rglob("training.yaml")):
        raw = yaml.safe_load(path.read_text())
        raw["student"]["trust_remote_code"] = True
        path.write_text(yaml.safe_dump(raw))
    return student


@attack(THEME, "scored a run whose recipe trusts its student's code", "student: ", NAMED)
def code_of_a_runs_student(world):
    foreign_run(world)
    tasks()
    return ["eval", "runs/tiny", "--tasks", "scenes_pope", "--include", "tasks"]


@attack(THEME, "released a run whose recipe trusts its student's code", "student: ", NAMED)
def code_of_a_released_student(world):
    student = foreign_run(world)
    bring(student, "processor_config.json", processor_class="Own")
    return ["release", "runs/tiny", "--out", "released"]


@attack(THEME, "released weights in another type, with code", "student: ", NAMED)
def code_of_a_rounded_student(world):
    foreign_run(world)
    return ["release", "runs/tiny", "dtype=bfloat16", "--out", "released"]


@attack(
    THEME,
    "named a repository of kernels as a model's attention",
    "model: its config names code on the Hub as its attention (evil/kernel)",
)
def attention_by_a_kernel(world):
    change("model/config.json", attn_implementation="evil/kernel")


@attack(THEME, "converted a model whose attention is a repository", "attention (evil/kernel@v1)")
def attention_by_a_kernel_under_convert(world):
    change("model/config.json", _attn_implementation="evil/kernel@v1")
    return ["convert", "model", "--layers", "0", "--out", "converted"]


@attack(THEME, "named a repository of kernels in a recipe", "its attention (evil/kernel)")
def attention_by_a_recipes_kernel(world):
    config = json.loads(Path("model/config.json").read_text())
    kept = {k: config[k] for k in ("model_type", "text_config", "vision_config")}
    world.raw["student"] = {
        "config": {**kept, "attn_implementation": "evil/kernel"},
        "processor": "model",
    }
    return ["plan", "recipe.yaml"]


def sharded(name):
    """A model of several files, by an index that names one of another kind."""
    weights = Path("model/model.safetensors")
    weights.rename("model/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    Path("model/evil.bin").write_bytes(b"\x80\x04c" + b"os\nsystem\n")


NO_SAFETENSORS = "it names a file that is not a safetensors file of this folder"


@attack(THEME, "mapped weights to a pickled file", f"{NO_SAFETENSORS} (evil.bin)")
def index_of_pickled_weights(world):
    sharded("evil.bin")


@attack(THEME, "mapped weights to a file of another folder", f"{NO_SAFETENSORS} (../teacher/model")
def index_of_another_folder(world):
    sharded("../teacher/model.safetensors")
    return ["convert", "model", "--layers", "0", "--out", "converted"]


@attack(THEME, "mapped weights to an absolute path", f"{NO_SAFETENSORS} (/etc/passwd")
def index_of_an_absolute_path(world):
    sharded("/etc/passwd.safetensors")
    return ["convert", "model", "--layers", "0", "--out", "converted"]


@attack(THEME, "wrote an index that is none", "index.json: it is damaged")
def index_of_another_shape(world):
    sharded("x")
    Path("model/model.safetensors.index.json").write_text("[]")


@attack(THEME, "put an adapter beside a model's weights", "model: it holds an adapter")
def adapter_beside_a_model(world):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "evil/base", "r": 1}
    Path("model/adapter_config.json").write_text(json.dumps(adapter))
    Path("model/adapter_model.bin").write_bytes(b"\x80\x04c" + b"os\nsystem\n")
    return ["convert", "model", "--layers", "0", "--out", "converted"]


@attack(THEME, "named a plugin in a recipe", "recipe.yaml: plugin: unknown key")
def plugin_in_a_recipe(world):
    Path("evil.py").write_text(EVIL)
    world.raw["plugin"] = ["evil.py"]


@attack(THEME, "named a data set's own script", "hub:evil: ")
def data_set_with_a_script(world):
    Path("evil").mkdir()
    Path("evil/evil.py").write_text(EVIL)
    world.raw["data"] = {"train": "hub:evil"}


def pickled_data(name, data):
    def prepare(world):
        Path("records.pkl").write_bytes(b"cbuiltins\nexec\n(S'" + EVIL.strip().encode() + b"'\ntR.")
        world.raw["data"] = data

    prepare.__name__ = name
    attack(THEME, f"had pickled data opened ({name})", "hub:pandas: ", "pickled")(prepare)


PICKLED = {"train": "hub:pandas"}
pickled_data("pickled_data", PICKLED)
pickled_data("pickled_data_as_a_stream", {"sources": [{**PICKLED, "stream": 4}]})
