"""Recipes that do not say what they should."""

import json
from pathlib import Path
from typing import Any

import yaml

from bad_inputs.table import World, case, overridden

KIND = "recipe"


def write(text: str, name: str = "recipe.yaml") -> None:
    Path(name).write_text(text)


def change_json(path: str, change: Any) -> None:
    found = json.loads(Path(path).read_text())
    change(found)
    Path(path).write_text(json.dumps(found))


@case(KIND, "named a recipe that is not there", "recipes.yaml: no such", "check the path")
def no_recipe(world: World) -> list[str]:
    return ["run", "recipes.yaml"]


@case(KIND, "wrote a bracket too few", "recipe.yaml: not YAML", "line 3", "mend the syntax")
def no_yaml(world: World) -> None:
    write("name: tiny\nstages: [\n")


@case(
    KIND, "wrote a recipe that would run a program", "python/object/apply", "recipe.yaml: not YAML"
)
def yaml_that_runs_code(world: World) -> None:
    write("name: !!python/object/apply:os.system ['touch hacked']\n")


@case(KIND, "wrote a list", "recipe.yaml: a recipe is a mapping of keys", "see configs/")
def a_list(world: World) -> None:
    write("- name: tiny\n")


@case(
    KIND, "extended a file that extends it back", "'extends' goes in a circle", "break the circle"
)
def extends_in_a_circle(world: World) -> None:
    write("extends: recipe.yaml", "base.yaml")
    write("extends: base.yaml")


@case(KIND, "extended a file that is not there", "base.yaml: no such recipe file", "check the path")
def extends_nothing(world: World) -> None:
    write("extends: base.yaml")


@case(
    KIND,
    "wrote a list where the extended recipe has a mapping",
    "recipe.yaml: data: one file has a mapping here, the other a list",
    "write what base.yaml and this file give together",
)
def list_over_a_mapping(world: World) -> None:
    write(yaml.safe_dump(world.raw), "base.yaml")
    write("extends: base.yaml\ndata: [train.json]\n")


@case(KIND, "hoped for another key's value", "${data.folder}/records.json: no", "check")
def interpolation(world: World) -> None:
    write(yaml.safe_dump(world.raw), "base.yaml")
    write("extends: base.yaml\ndata: {train: '${data.folder}/records.json'}\n")


overridden(
    KIND,
    "key_of_a_number",
    "stages.0.steps.first=1",
    "stages.0.steps.first: stages.0.steps is 1, which has no keys",
)
overridden(KIND, "stage_too_many", "stages.7.steps=3", "stages.7: stages is a list of 1 items")


@case(KIND, "left the student out", "recipe.yaml: student: this key is missing", "add it")
def no_student(world: World) -> None:
    del world.raw["student"]


overridden(KIND, "unknown_key", "optimiser={}", "recipe.yaml: optimiser: unknown key", "known: ")
overridden(
    KIND,
    "unknown_key_inside",
    "stages.0.optimizer.weigth_decay=0.1",
    "stages.0.optimizer.weigth_decay: unknown key",
    "did you mean 'weight_decay'?",
)
overridden(KIND, "wrong_type", "stages.0.steps=many", "stages.0.steps", "integer", "'many'")
overridden(KIND, "below_its_least", "stages.0.optimizer.lr=-1", "optimizer.lr", "greater than 0")
overridden(KIND, "no_such_choice", "stages.0.precision=fp8", "stages.0.precision", "'bfloat16'")
overridden(
    KIND,
    "unknown_objective",
    "stages.0.objectives=[{kind: reverse-kl}]",
    "stages.0.objectives.0: unknown kind 'reverse-kl'",
    "did you mean 'reverse_kl'?",
)
overridden(
    KIND,
    "objectives_of_one_name",
    "stages.0.objectives=[{kind: ce}, {kind: ce}]",
    "stages.0: two objectives have the same name",
    "give each a 'name'",
)
overridden(
    KIND,
    "steps_and_epochs",
    "stages.0.epochs=1",
    "stages.0: both of them or neither -- give either 'steps' or 'epochs'",
)
overridden(
    KIND,
    "size_and_tokens",
    "stages.0.batch={size: 4, tokens: 4096, total: 4}",
    "stages.0.batch: both of them -- give either 'size' or 'tokens'",
)
overridden(
    KIND,
    "tokens_for_no_record",
    "stages.0.batch={tokens: 512, total: 4}",
    "stage mimic: batch.tokens: ",
    "512 tokens cannot hold",
    "lower data.max_length",
)
overridden(
    KIND,
    "total_that_does_not_divide",
    "stages.0.batch={size: 4, total: 6}",
    "stages.batch: total 6 is no multiple of size 4",
    "change one of them",
)
overridden(
    KIND,
    "warmup_into_decay",
    "stages.0.schedule={kind: wsd, warmup: 0.6, decay: 0.6}",
    "stage mimic: schedule: warmup 0.6 and decay 0.6 take more than all steps",
    "lower one of them",
)


@case(
    KIND,
    "compared the records of micro-batches of one record",
    "stage mimic: objective affinity: it compares the records of a micro-batch",
    "set batch.size to 2 or more",
)
def one_record_to_compare(world: World) -> None:
    world.teach({"kind": "affinity"})
    world.stage(batch={"size": 1})


overridden(KIND, "no_groups", "stages.0.train=[]", "stages.0.train: nothing trains", "name groups")
overridden(
    KIND,
    "unknown_group",
    "stages.0.train=[visoin]",
    "stages.train: unknown group 'visoin'",
    "did you mean 'vision'?",
)
overridden(
    KIND,
    "group_of_nothing",
    "stages.0.train=[mamba]",
    "stages.train: the student has no parameters in 'mamba'",
    "leave it out",
)
overridden(
    KIND,
    "adapters_without_layers",
    "stages.0.train={lora: {groups: [embeddings]}}",
    "stages.train.lora: no linear layers in embeddings",
    "language_model",
)
overridden(
    KIND,
    "adapter_with_dropout_on_the_head",
    "stages.0.train={lora: {groups: [head], dropout: 0.1}}",
    "stages.0.train.lora: the head's adapter takes no dropout",
)
overridden(
    KIND,
    "override_without_equals",
    "stages.0.steps:5",
    "stages.0.steps:5: an override is written key.path=value",
    "add '='",
)
overridden(KIND, "override_of_no_item", "stages.3.steps=5", "stages.3.steps=5: ", "check the key")
overridden(
    KIND,
    "override_with_no_yaml",
    "stages.0.train=[all",
    "stages.0.train=[all: the value is no YAML",
    "quote the value",
)
overridden(
    KIND,
    "unknown_tracker",
    "report_to=tensorbord",
    "report_to: no tracker 'tensorbord'",
    "did you mean 'tensorboard'?",
)
overridden(
    KIND,
    "train_and_sources",
    "data.sources=[{train: more.json}]",
    "data: both of them or neither -- give either 'train' (one source) or 'sources' (a mixture)",
)
overridden(
    KIND,
    "zero_without_deepspeed",
    "stages.0.engine.zero=2",
    "stages.0.engine: 'zero' is of kind deepspeed, and the engine's kind is torch",
)
overridden(
    KIND,
    "no_deepspeed_file",
    "stages.0.engine={kind: deepspeed, config: zero.json}",
    "zero.json: cannot read the DeepSpeed file",
    "configs/deepspeed/zero2.json",
)
overridden(
    KIND,
    "device_of_no_kind",
    "stages.0.engine.device=gpu",
    "device: unknown device 'gpu'",
    "use auto",
)
overridden(
    KIND,
    "variant_with_an_unknown_key",
    "variants={long: [stages.0.step=9]}",
    "stages.0.step: unknown key",
    "did you mean 'steps'?",
)
overridden(
    KIND,
    "no_teacher",
    "stages.0.objectives=[{kind: kl}]",
    "stage mimic: objective kl needs a teacher",
    "add 'teacher' to the recipe",
)
overridden(
    KIND,
    "no_experts",
    "stages.0.objectives=[{kind: ce}, {kind: balance}]",
    "stage mimic: objective balance needs a student with experts",
    "student.convert",
)
overridden(
    KIND,
    "impossible_layers",
    "student.convert=[{kind: layers, decoder: [7]}]",
    "student.convert: ",
    "cannot keep layers [7] of 2",
    "from 0 to 1",
)
overridden(
    KIND,
    "unknown_architecture",
    "student={config: {model_type: lava}, processor: model}",
    "config of lava: no such architecture",
    "check model_type",
)
overridden(
    KIND,
    "output_in_a_file",
    "output_dir=records.json",
    "records.json/tiny: cannot be",
    "check the path",
)


@case(
    KIND,
    "gave the head an adapter that has the embeddings' weight",
    "stages.train.lora: the head shares its weight",
    "leave 'head' out",
)
def adapter_on_a_tied_head(world: World) -> None:
    def tie(config: Any) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    change_json("model/config.json", tie)
    world.stage(train={"lora": {"groups": ["head"]}})


@case(
    KIND,
    "gave a DeepSpeed file that says otherwise",
    "engine.config zero.json",
    "gradient_clipping is 0.5, the recipe says 1.0",
    "write auto",
)
def deepspeed_file_that_contradicts(world: World) -> None:
    write(json.dumps({"gradient_clipping": 0.5}), "zero.json")
    world.stage(engine={"kind": "deepspeed", "config": "zero.json", "device": "cpu"})


@case(
    KIND,
    "packed rows for an objective that relates tokens",
    "stage mimic: batch.pack",
    "objective relation relates the tokens of a row",
    "set it to null",
)
def packed_relations(world: World) -> None:
    world.teach({"kind": "relation"})
    world.stage(batch={"size": 4, "pack": 2048})


@case(
    KIND,
    "sampled the student's answers for cross-entropy",
    "stage mimic: objective ce: with 'on_policy'",
    "distil with kl",
)
def cross_entropy_on_policy(world: World) -> None:
    world.stage(on_policy={})


# Held-out records


@case(
    KIND,
    "asked for the best student of no held-out records",
    "stage mimic: validation: no records are held out",
    "add 'validation' to data",
)
def best_of_nothing(world: World) -> None:
    world.stage(validation={"keep": "best"})


overridden(
    KIND,
    "all_held_out",
    "data.validation=1.0",
    "recipe.yaml: data.validation: got 1.0",
    "a share of the training records between 0 and 1",
)
overridden(
    KIND,
    "weighted_validation",
    "data.validation=[{train: records.json, weight: 2}]",
    "recipe.yaml: data.validation: 'weight' is of training",
    "leave it out",
)
overridden(
    KIND,
    "patience_without_validations",
    "stages.0.validation={every: null, patience: 2}",
    "recipe.yaml: stages.0.validation: 'patience' needs validations",
    "set 'every'",
)
overridden(
    KIND,
    "metric_of_nothing",
    "stages.0.validation.metric=ce",
    "recipe.yaml: stages.0.validation: 'metric' is of 'keep: best' and 'patience'",
    "set one of them",
)


@case(
    KIND,
    "held a share of a stream out",
    "recipe.yaml: data: no share of a stream can be held out",
    "give 'validation' a file",
)
def share_of_a_stream(world: World) -> None:
    world.raw["data"] = {"sources": [{"train": "hub:me/data", "stream": 9}], "validation": 0.1}


@case(
    KIND,
    "compared validations by an unknown metric",
    "stage mimic: validation.metric: no metric 'anser_ce'",
    "did you mean 'answer_ce'?",
)
def unknown_metric(world: World) -> None:
    world.raw["data"]["validation"] = "records.json"
    world.stage(validation={"metric": "anser_ce", "keep": "best"})


@case(
    KIND,
    "validated pairs whose reference runs once",
    "stage mimic: validation: the reference of preferences runs once",
    "set reference_logps to live",
)
def validation_behind_a_stored_reference(world: World) -> None:
    world.teach({"kind": "preference", "loss": "sigmoid", "reference_logps": "once"})
    world.pairs()
    world.raw["data"]["validation"] = "records.json"


@case(
    KIND, "asked for an unknown evaluation", "unknown task 'scenes_pop'", "did you mean scenes_pope"
)
def unknown_evaluation(world: World) -> None:
    task_folder()
    world.raw["evaluate"] = {"tasks": ["scenes_pop"], "include": "tasks"}


@case(
    KIND,
    "asked for an evaluation without its data",
    "tasks/scenes_pope.yaml: the data of task",
    "questions.parquet",
    "mmkd data build scenes",
)
def evaluation_without_data(world: World) -> None:
    task_folder(dataset_path="parquet", dataset_kwargs={"data_files": "questions.parquet"})
    world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks"}


@case(
    KIND,
    "asked offline for a benchmark on the Hub",
    "lmms-lab-encoder/POPE: the data of task pope cannot be reached",
    "give its files as `local`",
)
def evaluation_out_of_reach(world: World) -> None:
    world.raw["evaluate"] = {"tasks": ["pope"]}


@case(KIND, "cut a pair of MME's questions", "limit 3 parts one", "give an even limit")
def pairs_of_questions(world: World) -> None:
    world.raw["evaluate"] = {"tasks": ["mme"], "limit": 3}


@case(
    KIND,
    "asked for a benchmark that is scored by likelihoods",
    "task seedbench_ppl is not answered by generation",
    "use seedbench",
)
def evaluation_by_likelihoods(world: World) -> None:
    world.raw["evaluate"] = {"tasks": ["seedbench_ppl"]}


@case(
    KIND,
    "trained a student in float16",
    "student.dtype, in stage mimic: gradients in float16 vanish",
    "set it to bfloat16 or float32",
)
def float16_student(world: World) -> None:
    world.raw["student"]["dtype"] = "float16"


@case(
    KIND,
    "asked for a 4-bit teacher without a GPU",
    "teacher teacher: quantize: cannot load a model in 4bit (a quantized model needs a GPU)",
    "leave 'quantize' out",
)
def quantized_teacher_on_a_cpu(world: World) -> None:
    world.raw["teacher"] = {"model": world.raw["student"]["model"], "quantize": "4bit"}


@case(
    KIND,
    "spread a 4-bit teacher over processes",
    "placement sharded cuts weights into pieces, 'quantize' packs them",
    "leave one of them out",
)
def quantized_and_sharded(world: World) -> None:
    model = world.raw["student"]["model"]
    world.raw["teacher"] = {"model": model, "quantize": "4bit", "placement": "sharded"}


@case(
    KIND,
    "misspelt a task's generation setting",
    "task scenes_pope: its generation_kwargs have 'max_new_token', which mmkd does not know",
    "did you mean 'max_new_tokens'?",
)
def evaluation_with_an_unknown_setting(world: World) -> None:
    task_folder(generation_kwargs={"max_new_token": 8})
    world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks"}


@case(
    KIND, "asked for an evaluation of nothing", "evaluate", "nothing to evaluate", "give 'samples'"
)
def empty_evaluation(world: World) -> None:
    world.raw["evaluate"] = {"teacher": True}


@case(KIND, "gave no pictures for samples", "evaluate.samples", "nothing to show", "'images'")
def samples_of_nothing(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"count": 3}}


@case(
    KIND,
    "gave samples both records and a list of pictures",
    "evaluate.samples",
    "'images' is a folder where there are 'records'",
)
def samples_of_two_sources(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"records": "train.json", "images": ["picture.png"]}}


@case(KIND, "asked records other prompts", "evaluate.samples", "'prompts' are asked about 'images'")
def samples_with_prompts(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"records": "train.json", "prompts": ["What?"]}}


@case(
    KIND,
    "named a sample picture that is not there",
    "gone.png: no such picture",
    "evaluate.samples.images",
)
def sample_picture_gone(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"images": ["gone.png"]}}


@case(
    KIND, "named a folder of samples that is not there", "gone: no such folder of pictures",
    "check evaluate.samples.images",
)  # fmt: skip
def sample_folder_gone(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"images": "gone"}}


@case(
    KIND, "named a folder of samples without pictures", "none: no pictures in it", "read are .jpg"
)
def sample_folder_empty(world: World) -> None:
    Path("none").mkdir()
    world.raw["evaluate"] = {"samples": {"images": "none"}}


@case(
    KIND,
    "wrote the processor's placeholder in a sample's prompt",
    "picture.png: the text of turn 0 contains <image>",
)
def sample_that_is_refused(world: World) -> None:
    world.raw["evaluate"] = {
        "samples": {"images": ["picture.png"], "prompts": ["Is <image> a cat?"]}
    }


def task_folder(**settings: Any) -> None:
    Path("tasks").mkdir()
    write(yaml.safe_dump({"task": "scenes_pope", **settings}), "tasks/scenes_pope.yaml")
