"""Task files of lmms-eval that try to run code: each leaves the file `ran` if it can."""

from pathlib import Path

from tests.attacks.code import EVIL, FUNCTION, NAMED, TASK, THEME, task, tasks
from tests.attacks.table import attack

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
