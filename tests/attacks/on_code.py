"""Folders and recipes that try to run code. Each would write the file `ran`."""

import json
from pathlib import Path

import yaml

from tests.attacks.table import attack
from tests.support.bad_inputs.table import change_json

THEME = "code"
EVIL = "open('ran', 'w').close()\n"
CLASSES = {
    "AutoConfig": "own.Own",
    "AutoModelForImageTextToText": "own.Own",
    "AutoProcessor": "own.Own",
    "AutoTokenizer": ["own.Own", "own.Own"],
    "AutoImageProcessor": "own.Own",
}
NAMED = "--trust-remote-code"


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


FUNCTION = "!function mmkd.evaluation.scenes."
TASK = f"""\
task: scenes_pope
dataset_path: json
dataset_kwargs: {{data_files: {{test: ../records.json}}}}
test_split: test
output_type: generate_until
doc_to_visual: {FUNCTION}images
doc_to_text: question
doc_to_target: answer
process_results: {FUNCTION}process_pope
metric_list:
  - {{metric: pope_accuracy, aggregation: {FUNCTION}accuracy, higher_is_better: true}}
"""


def tasks(text=TASK):
    """A folder of one task, and code that it may name."""
    Path("tasks").mkdir()
    Path("tasks/scenes_pope.yaml").write_text(text)
    Path("tasks/own.py").write_text(EVIL + "def run(*_):\n    return []\n")


def task(world, text):
    tasks(text)
    world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks", "teacher": False}


CODE = ("tasks/scenes_pope.yaml: a task file can run Python", f"add {NAMED} tasks to the command")


@attack(THEME, "named a function of a task's folder", *CODE)
def task_with_a_function(world):
    task(world, TASK.replace(f"{FUNCTION}images", "!function own.run"))


@attack(THEME, "named a function of a task's folder, under `plan`", *CODE)
def task_with_a_function_under_plan(world):
    task(world, TASK.replace(f"{FUNCTION}images", "!function own.run"))
    return ["plan", "recipe.yaml"]


@attack(THEME, "named a function of a task's folder, under `eval`", *CODE)
def task_with_a_function_under_eval(world):
    tasks(TASK.replace(f"{FUNCTION}images", "!function own.run"))
    return ["eval", "model", "--tasks", "scenes_pope", "--include", "tasks"]


@attack(THEME, "named a function of an installed package", *CODE)
def task_with_a_function_of_os(world):
    task(world, TASK.replace(f"{FUNCTION}images", "!function os.system"))


@attack(THEME, "wrote a module over that of mmkd", "scenes.py is in the same folder")
def task_with_a_shadow(world):
    task(world, TASK)
    Path("tasks/mmkd.evaluation.scenes.py").write_text(EVIL)


@attack(THEME, "wrote a task's question as a template", *CODE)
def task_with_a_template(world):
    task(world, TASK.replace("doc_to_text: question", "doc_to_text: '{{ cycler.__init__ }}'"))


@attack(THEME, "had a task's metric fetched", *CODE)
def task_with_a_fetched_metric(world):
    text = TASK.replace(f"process_results: {FUNCTION}process_pope\n", "")
    task(world, text.replace("pope_accuracy", "evil"))


@attack(THEME, "named a Python object beside a task", "tasks/z.yaml: a task file can run Python")
def task_with_a_python_object(world):
    task(world, TASK)
    Path("tasks/z.yaml").write_text("metadata: !!python/name:os.system\n")


@attack(THEME, "had a task's data built by a script", *CODE)
def task_with_a_script(world):
    task(world, TASK.replace("{data_files:", "{builder_script: own.py, data_files:"))


@attack(THEME, "had a task's videos fetched by a shell", *CODE)
def task_with_a_shell(world):
    task(world, TASK.replace("{data_files:", "{From_YouTube: true, cache_dir: x, data_files:"))


@attack(THEME, "included a task file from elsewhere", *CODE)
def task_that_includes_another_folder(world):
    Path("elsewhere").write_text("doc_to_text: !function own.run\n")
    task(world, TASK + "include: ../elsewhere\n")


@attack(THEME, "included a task file that stands in the working directory, too", *CODE)
def task_that_includes_twice(world):
    Path("base").write_text("doc_to_text: !function own.run\n")
    task(world, TASK + "include: base\n")
    Path("tasks/base").write_text("metadata: {}\n")


@attack(THEME, "hid code in an included task file", *CODE)
def task_that_includes_code(world):
    task(world, TASK.replace("doc_to_text: question\n", "") + "include: base\n")
    Path("tasks/base").write_text("doc_to_text: !function own.run\n")


@attack(THEME, "hid a second task of the same name", "tasks/z/other.yaml: a task file can run")
def task_of_the_same_name(world):
    task(world, TASK)
    Path("tasks/z").mkdir()
    Path("tasks/z/other.yaml").write_text(TASK.replace(f"{FUNCTION}images", "!function own.run"))


@attack(THEME, "wrote a task as a class", *CODE)
def task_of_a_class(world):
    task(world, "task: scenes_pope\nclass: !function own.run\n")


def hidden_in(name, did, text, *, base=None):
    """A second task of the same name, whose text hides code from a reader of its keys."""

    def prepare(world):
        task(world, TASK)
        Path("tasks/z.yaml").write_text(text)
        if base is not None:
            Path("tasks/base").write_text(base)

    prepare.__name__ = f"task_{name}"
    attack(THEME, did, "tasks/z.yaml: a task file can run Python", CODE[1])(prepare)


INLINE = "{task: a, dataset_path: json, metric_list: [{metric: own/own}]}"
TOO_LARGE = "metadata: 99999999999999999999999\n"
WITHOUT = TASK.replace("doc_to_text: question\n", "")
hidden_in(
    *("that_merges_an_include", "hid code in a task file that a merge key includes"),
    TASK + "<<: {include: base}\n",
    base="metadata: !function own.run\n",
)
hidden_in(
    *("that_merges_a_list_of_includes", "hid code behind merge keys and a list of includes"),
    TASK + "<<: [{tag: a}, {include: [base]}]\n",
    base="metadata: !function own.run\n",
)
hidden_in("within_a_task", "wrote a task inside of a task", f"task: [{INLINE}]\n")
hidden_in("within_a_merge", "merged a task into a task", f"<<: {{task: {INLINE}}}\n" + TASK[18:])
hidden_in(
    *("beside_a_large_number", "hid a template beside a number that mmkd does not read"),
    WITHOUT + TOO_LARGE + "doc_to_text: '{{ cycler.__init__ }}'\n",
)
hidden_in(
    *("that_includes_a_large_number", "hid a template in a file with such a number"),
    WITHOUT + "include: base\n",
    base=TOO_LARGE + "doc_to_text: '{{ cycler.__init__ }}'\n",
)
hidden_in("too_deep", "nested a task's settings", TASK + f"metadata: {'[' * 4000}{']' * 4000}\n")
hidden_in("that_includes_itself", "let a task include itself", TASK + "include: z.yaml\n")
hidden_in("that_includes_a_number", "let a task include a number", TASK + "include: 5\n")
hidden_in("that_includes_nothing", "let a task include nothing", TASK + "include:\n")
hidden_in("of_a_nameless_file", "let a task include a NUL", TASK + 'include: "\\0"\n')
hidden_in(
    *("with_data_on_the_web", "had a task's data fetched from the web"),
    TASK.replace("../records.json", "http://localhost:1/a.json"),
)
hidden_in(
    *("with_pickled_data", "had a task's pickled data opened"),
    TASK.replace("dataset_path: json", "dataset_path: pandas"),
)
