"""Recipes that cannot be read, and keys with invalid values."""

from pathlib import Path
from typing import Any

import yaml

from tests.support.bad_inputs.table import World, case, overridden, write

KIND = "recipe"


@case(KIND, "named a recipe that is not there", "recipes.yaml: no such", "check the path")
def no_recipe(world: World) -> list[str]:
    return ["run", "recipes.yaml"]


@case(KIND, "left out a closing bracket", "recipe.yaml: not YAML", "line 3", "fix the syntax")
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


@case(KIND, "wrote `${...}` for another key's value", "${data.folder}/records.json: no", "check")
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
overridden(KIND, "below_its_least", "stages.0.optimizer.lr=-1", "optimizer.lr", "greater than")
overridden(KIND, "no_such_choice", "stages.0.precision=fp8", "stages.0.precision", "'bfloat16'")
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
    "variant_with_an_unknown_key",
    "variants={long: [stages.0.step=9]}",
    "stages.0.step: unknown key",
    "did you mean 'steps'?",
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
    "output_in_a_file",
    "output_dir=records.json",
    "records.json/tiny: cannot be",
    "check the path",
)
overridden(
    KIND,
    "impossible_layers",
    "student.convert=[{kind: depth_pruning, decoder: [7]}]",
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


@case(
    KIND,
    "trained a student in float16",
    "student.dtype, in stage mimic: float16 gradients underflow",
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
    "sharded a 4-bit teacher over processes",
    "placement sharded does not work with 'quantize'",
    "leave one of them out",
)
def quantized_and_sharded(world: World) -> None:
    model = world.raw["student"]["model"]
    world.raw["teacher"] = {"model": model, "quantize": "4bit", "placement": "sharded"}


overridden(
    KIND,
    "tokenizer_of_a_stage",
    "stages.0.convert=[{kind: tokenizer, processor: teacher}]",
    "stages.0.convert: 'tokenizer' changes the processor, which all stages of a student share",
    "put it into student.convert",
)


@case(
    KIND,
    "transferred a student to a tokenizer whose template writes no image",
    "student.convert: tokenizer: the model's LlavaProcessor does not work with the tokenizer of "
    "teacher: the chat template writes no <image> for an image",
    "set 'special_tokens: keep'",
)
def tokenizer_without_images(world: World) -> None:
    turn = "{{ m['role'] }}: {% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    template = f"{{% for m in messages %}}{turn}\n{{% endfor %}}"
    Path("teacher/chat_template.jinja").write_text(template)
    world.raw["student"]["convert"] = [{"kind": "tokenizer", "processor": "teacher"}]


def assisted(world: World, **changes: Any) -> None:
    world.raw["teacher"] = {"model": "teacher"}
    stage = {**world.raw["stages"][0], "name": "narrow"}
    world.raw["assistant"] = {"student": {"model": "model"}, "stages": [{**stage, **changes}]}


@case(
    KIND,
    "gave the assistant's stage the name of a student's",
    "two stages of assistant and students have the same name",
    "rename one",
)
def stage_names_of_the_assistant(world: World) -> None:
    assisted(world, name="mimic")


@case(
    KIND,
    "called a student `assistant`, with an assistant",
    "a student has the label 'assistant', which the assistant has",
    "rename it",
)
def student_with_the_assistants_label(world: World) -> None:
    assisted(world)
    world.raw["label"] = "assistant"


@case(
    KIND,
    "changed the assistant in a variant",
    "a variant changes the assistant, which all students share",
    "write a recipe of its own for it",
)
def variant_of_the_assistant(world: World) -> None:
    assisted(world)
    world.raw["variants"] = {"long": ["assistant.stages.0.steps=9"]}


@case(
    KIND,
    "changed the evaluation in a variant",
    "the variant 'long' changes 'evaluate', which is one for all students of a run",
    "write a recipe of its own for it",
)
def variant_of_the_evaluation(world: World) -> None:
    world.raw["variants"] = {"long": ["evaluate.limit=9"]}


@case(
    KIND,
    "gave a recipe with an assistant two teachers",
    "with 'assistant' there is at most one teacher, which runs",
    "name one with 'source: live'",
)
def assistant_with_two_teachers(world: World) -> None:
    assisted(world)
    world.raw["teacher"] = [{"model": "teacher"}, {"model": "model", "name": "other"}]
