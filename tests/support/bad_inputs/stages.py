"""Stages with contradictory settings."""

import json
from pathlib import Path
from typing import Any

from tests.support.bad_inputs.table import World, case, change_json, overridden, write

KIND = "stage"

overridden(
    KIND,
    "unknown_objective",
    "stages.0.objectives=[{kind: reverse-kl}]",
    "stages.0.objectives.0: unknown kind 'reverse-kl'",
    "did you mean 'reverse_kl'?",
)
overridden(
    KIND,
    "stage_of_no_teacher",
    "stages.0.teacher=large",
    "stage mimic: teacher: no teacher 'large'",
    "name it in the recipe's 'teacher'",
)
overridden(
    KIND,
    "teacher_after_no_stage",
    "stages.0.teacher={stage: align}",
    "stage mimic: teacher: no earlier stage 'align'",
    "it is the first stage; name a teacher",
)
overridden(
    KIND,
    "gamma_without_debiasing",
    "stages.0.objectives=[{kind: alm, temperature: 100.0, gamma: 0.5}]",
    "stages.0.objectives.0: 'gamma' is for 'debias: outcome' or 'both' only",
    "leave it out",
)
overridden(
    KIND,
    "logits_after_layers",
    "stages.0.objectives=[{kind: relation, layers: [0]}]",
    "stages.0.objectives.0: 'layers' have hidden states, no logits",
    "add 'features: hidden'",
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
    "stages.0.batch: both are given -- give either 'size' or 'tokens'",
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
    "stages.batch: total 6 is not a multiple of size 4",
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
    "compared records in micro-batches of one record",
    "stage mimic: objective affinity: it compares the records of a micro-batch",
    "set 'gather: true'",
)
def one_record_to_compare(world: World) -> None:
    world.teach({"kind": "affinity", "gather": False})
    world.stage(batch={"size": 1})


@case(
    KIND,
    "compared records in steps of one record",
    "stage mimic: objective affinity: it compares the records of a step",
    "raise batch.size",
)
def one_record_in_a_step(world: World) -> None:
    world.teach({"kind": "affinity"})
    world.stage(batch={"size": 1})


def weigh(world: World, *objectives: dict[str, Any], **ensemble: Any) -> None:
    """Two teachers, of which the second one sees one of two sources."""
    world.teach(*objectives)
    sources = [{"train": "records.json", "name": name} for name in ("talk", "letters")]
    world.raw["data"] = {"sources": sources}
    second = {"model": "teacher", "name": "ocr", "sources": ["letters"]}
    world.raw["teacher"] = [{"model": "teacher"}, second]
    world.stage(ensemble=ensemble)


@case(
    KIND,
    "weights of a single teacher",
    "stage mimic: ensemble: it weighs several teachers, and there is one",
    "make 'teacher' a list",
)
def ensemble_of_one(world: World) -> None:
    world.teach()
    world.stage(ensemble={"kappa": 1.0})


@case(
    KIND,
    "weights of teachers for cross-entropy",
    "stage mimic: ensemble: no objective of the stage compares with several teachers",
    "add a divergence such as kl",
)
def ensemble_without_divergence(world: World) -> None:
    weigh(world, {"kind": "ce"}, normalize=True)


@case(
    KIND,
    "weights by token of a loss without tokens",
    "stage mimic: objective relation: 'ensemble' weighs teachers by token",
    "leave 'ensemble' out",
)
def ensemble_of_relations(world: World) -> None:
    weigh(world, {"kind": "kl"}, {"kind": "relation"}, kappa=1.0)


@case(
    KIND,
    "weights by token of exits",
    "stage mimic: objective exits: 'ensemble' weighs teachers by token",
    "leave 'ensemble' out",
)
def ensemble_of_exits(world: World) -> None:
    weigh(world, {"kind": "kl"}, {"kind": "exits", "layers": [0]}, kappa=1.0)


@case(
    KIND,
    "acceptance over the records of all teachers",
    "stage mimic: objective kl: 'acceptance' is a mean over each teacher's records",
    "leave one of them out",
)
def ensemble_with_acceptance(world: World) -> None:
    weigh(world, {"kind": "kl", "acceptance": True}, normalize=True)


@case(
    KIND,
    "weights of teachers for an objective of one source",
    "stage mimic: objective kl: sources: 'ensemble' weighs the teachers over the records of all",
    "put the objective in a stage of its own",
)
def ensemble_of_a_source(world: World) -> None:
    weigh(world, {"kind": "kl", "sources": ["letters"]}, kappa=1.0)


@case(
    KIND,
    "an objective of an unknown source",
    "stage mimic: objective ce: sources: no data source 'leters'",
    "did you mean 'letters'?",
)
def objective_of_no_source(world: World) -> None:
    weigh(world, {"kind": "ce", "sources": ["leters"]})
    world.stage(ensemble=None)


@case(
    KIND,
    "an objective of a source that its teacher does not have",
    "stage mimic: objective kl: sources: it has no data source in common with its teacher",
    "leave one of the two out",
)
def objective_without_its_teacher(world: World) -> None:
    weigh(world, {"kind": "kl", "sources": ["talk"]})
    world.raw["teacher"] = {"model": "teacher", "sources": ["letters"]}
    world.stage(ensemble=None)


@case(
    KIND,
    "an objective of a source without held-out records",
    "objective ce: sources, for data.validation: no data source 'talk'",
    "letters",
)
def objective_without_held_out_records(world: World) -> None:
    weigh(world, {"kind": "ce", "sources": ["talk"]})
    world.raw["data"]["validation"] = [{"train": "records.json", "name": "letters"}]
    world.stage(ensemble=None)


overridden(
    KIND,
    "preferences_of_a_source",
    "stages.0.objectives=[{kind: preference, sources: [a]}]",
    "stages.0.objectives.0: it covers all records of a stage",
    "leave 'sources' out",
)
overridden(
    KIND,
    "ensemble_of_nothing",
    "stages.0.ensemble={}",
    "stages.0.ensemble: nothing is set",
    "add 'normalize: true' or 'kappa'",
)
overridden(
    KIND, "no_groups", "stages.0.train=[]", "stages.0.train: nothing is trained", "name groups"
)
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


@case(
    KIND,
    "compared the last layers with attention of a student without attention",
    "objective minilm: the student has no layer with attention for 'layers: last'",
    "name 'layers'",
)
def last_attention_of_none(world: World) -> None:
    world.raw["teacher"] = {"model": "model"}
    world.raw["student"]["convert"] = [{"kind": "mamba", "layers": [0, 1]}]
    world.stage(objectives=[{"kind": "minilm", "layers": "last"}])


@case(
    KIND,
    "compared the attention of a student that does not return its probabilities",
    "objective matrix: it needs the student's attention probabilities",
    "set student.attn_implementation to eager",
)
def probabilities_of_the_student(world: World) -> None:
    world.raw["teacher"] = {"model": "model", "attn_implementation": "eager"}
    world.stage(objectives=[{"kind": "matrix", "layers": [0]}])


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
    "stages.0.train.lora: the head's adapter cannot have dropout",
)


@case(
    KIND,
    "gave an adapter to a head that shares the embeddings' weight",
    "stages.train.lora: the head's weight is tied",
    "leave 'head' out",
)
def adapter_on_a_tied_head(world: World) -> None:
    def tie(config: Any) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    change_json("model/config.json", tie)
    world.stage(train={"lora": {"groups": ["head"]}})


overridden(
    KIND,
    "zero_without_deepspeed",
    "stages.0.engine.zero=2",
    "stages.0.engine: 'zero' is for kind deepspeed, and the engine's kind is torch",
)
overridden(
    KIND,
    "no_deepspeed_file",
    "stages.0.engine={kind: deepspeed, config: zero.json}",
    "zero.json: cannot read the DeepSpeed file",
    "configs/deepspeed/zero2.json",
)


@case(
    KIND,
    "gave a DeepSpeed file with a setting that differs from the recipe's",
    "engine.config zero.json",
    "gradient_clipping is 0.5, the recipe says 1.0",
    "write auto",
)
def deepspeed_file_that_contradicts(world: World) -> None:
    write(json.dumps({"gradient_clipping": 0.5}), "zero.json")
    world.stage(engine={"kind": "deepspeed", "config": "zero.json", "device": "cpu"})


overridden(
    KIND,
    "device_of_no_kind",
    "stages.0.engine.device=gpu",
    "device: unknown device 'gpu'",
    "use auto",
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


@case(
    KIND,
    "packed records for an objective that relates tokens",
    "stage mimic: batch.pack",
    "objective relation relates the tokens of a row",
    "set it to null",
)
def packed_relations(world: World) -> None:
    world.teach({"kind": "relation"})
    world.stage(batch={"size": 4, "pack": 2048})


@case(
    KIND,
    "used cross-entropy on answers that the student samples",
    "stage mimic: objective ce: with 'on_policy'",
    "distil with kl",
)
def cross_entropy_on_policy(world: World) -> None:
    world.stage(on_policy={})


overridden(
    KIND,
    "no_image_tokens_kept",
    "stages.0.image_tokens.keep=0",
    "stages.0.image_tokens.keep",
    "greater than 0",
)


@case(
    KIND,
    "left image tokens out of packed rows",
    "stage mimic: image_tokens: image tokens cannot be left out of packed rows",
    "set batch.pack to null",
)
def image_tokens_of_packed_rows(world: World) -> None:
    world.stage(image_tokens={"keep": 0.5}, batch={"size": 4, "pack": 2048})


@case(
    KIND,
    "left image tokens out of a student with sliding-window attention",
    "stage mimic: image_tokens: student: ",
    "sliding-window attention",
    "use a model without sliding windows",
)
def image_tokens_in_sliding_windows(world: World) -> None:
    world.stage(image_tokens={"keep": 0.5})
    sliding = {"model_type": "mistral", "sliding_window": 8}
    change_json("model/config.json", lambda config: config["text_config"].update(sliding))


@case(
    KIND,
    "left image tokens out, with a reference that is computed once",
    "stage mimic: objective preference: the reference of preferences is computed once",
    "set reference_logps to live",
)
def image_tokens_and_a_stored_reference(world: World) -> None:
    world.pairs()
    world.stage(
        image_tokens={"keep": 0.5},
        objectives=[{"kind": "preference", "reference": "self", "reference_logps": "once"}],
    )


overridden(
    KIND,
    "corrections_without_samples",
    "stages.0.on_policy={lmbda: 0, correct: 1}",
    "stages.0.on_policy: 'correct' needs sampled answers",
    "set 'lmbda' above 0",
)


@case(
    KIND,
    "let a teacher correct answers whose distribution no objective reads",
    "stage mimic: on_policy.correct: no objective reads the teacher's distribution",
    "add kl, reverse_kl or jsd",
)
def correction_without_distribution(world: World) -> None:
    world.teach({"kind": "hidden_mse", "layers": [0]})
    world.stage(on_policy={"correct": 1})


@case(
    KIND,
    "let a teacher of another tokenizer correct answers",
    "stage mimic: on_policy.correct: the teacher has another tokenizer",
    "of the same tokenizer family",
)
def correction_by_another_tokenizer(world: World) -> None:
    world.teach({"kind": "alm"})
    world.stage(on_policy={"correct": 1})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path("teacher") / name
        path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
