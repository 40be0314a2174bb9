"""Runs and teacher caches that cannot be resumed."""

import json
import os
import shutil
from pathlib import Path

from tests.support.bad_inputs.table import RUN, World, case, record

# Runs


@case(
    "run",
    "changed the recipe of a run",
    "runs/tiny: the folder has a run of another recipe",
    "seed",
    "give the run another name",
)
def run_of_another_recipe(world: World) -> None:
    world.take(world.given.trained, "runs")
    world.raw["seed"] = 7


@case(
    "run",
    "changed a stage that is trained",
    "runs/tiny: the folder has a run of another recipe, which differs in stages.0.optimizer.lr",
    "`mmkd run RECIPE --from-stage mimic`",
)
def run_of_a_changed_stage(world: World) -> None:
    world.take(world.given.trained, "runs")
    world.stage(optimizer={"lr": 0.5})


@case(
    "run", "named an unknown stage with --from-stage", "--from-stage mimc: no such stage", "mimic"
)
def from_no_stage(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    return [*RUN, "--from-stage", "mimc"]


@case(
    "run",
    "named a stage after the first changed one with --from-stage",
    "--from-stage second: stage mimic before it has changed too, in stages.0.optimizer.lr",
    "give --from-stage mimic",
)
def from_a_later_stage(world: World) -> list[str]:
    world.take(world.given.trained, "runs")
    world.stage(optimizer={"lr": 0.5})
    world.raw["stages"].append({**world.raw["stages"][0], "name": "second"})
    return [*RUN, "--from-stage", "second"]


@case(
    "run",
    "resumed with another batch",
    "checkpoints/step-1: a step had 4 records, and now it would",
    "set batch.total=4",
)
def checkpoint_of_another_batch(world: World) -> None:
    world.take(world.given.stopped, "runs")
    world.stage(steps=2, checkpoint={"interval": 1}, batch={"size": 2})


@case("run", "damaged a run's training.yaml", "training.yaml", "delete")
def broken_training(world: World) -> None:
    world.take(world.given.stopped, "runs")
    Path("runs/tiny/training.yaml").write_text("stages: [")
    world.stage(steps=2, checkpoint={"interval": 1})


@case(
    "run",
    "deleted the student of a finished stage",
    "runs/tiny/01-mimic: its student is gone",
    "delete",
)
def student_of_a_stage_is_gone(world: World) -> None:
    world.raw["stages"] *= 2
    world.raw["stages"][1] = {**world.raw["stages"][0], "name": "second"}
    world.take(world.given.trained, "runs")
    shutil.rmtree("runs/tiny/01-mimic/student")
    os.remove("runs/tiny/training.yaml")


# A teacher's cache


def cached(world: World) -> None:
    world.cache()
    world.take(world.given.cached, "cache")


@case(
    "cache",
    "added held-out records after the cache was built",
    "held.json: ",
    "not in the teacher's cache",
)
def cache_without_held_out_records(world: World) -> None:
    cached(world)
    turns = record()["conversations"]
    other = record(conversations=[turns[0], {**turns[1], "value": "no"}])
    Path("held.json").write_text(json.dumps([other]))
    world.raw["data"]["validation"] = "held.json"


@case(
    "cache",
    "left image tokens out, with a teacher's cache",
    "stage mimic: image_tokens: a teacher's cache has outputs for all image tokens",
    "set teacher.source to live",
)
def cache_of_all_image_tokens(world: World) -> None:
    cached(world)
    world.stage(image_tokens={"keep": 0.5})


@case(
    "cache",
    "trained before the cache was built",
    "cache: the teacher's cache is not there",
    "build it with `mmkd cache RECIPE`",
)
def no_cache(world: World) -> None:
    world.cache()


@case(
    "cache",
    "trained before the cache was complete",
    "cache: the teacher's cache is begun and not complete",
    "build it with `mmkd cache RECIPE`",
)
def cache_that_is_not_complete(world: World) -> None:
    cached(world)
    os.remove("cache/manifest.json")


@case("cache", "damaged the cache's manifest", "cache/manifest.json: it cannot be read", "build it")
def broken_manifest(world: World) -> None:
    cached(world)
    Path("cache/manifest.json").write_text("{")


@case(
    "cache",
    "cut a shard of the cache",
    "cache/rows-0-0.safetensors: it is missing or cut",
    "build it",
)
def cut_shard(world: World) -> None:
    cached(world)
    os.truncate("cache/rows-0-0.safetensors", 100)


@case(
    "cache", "changed a byte of the cache", "rows-0-0.safetensors: damaged (checksum)", "build it"
)
def changed_shard(world: World) -> None:
    cached(world)
    path = Path("cache/rows-0-0.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@case(
    "cache",
    "named another teacher",
    "teacher.cache cache: it was built from other weights than",
    "build it again",
)
def cache_of_another_teacher(world: World) -> None:
    cached(world)
    world.raw["teacher"]["model"] = "model"


@case(
    "cache",
    "changed the processor",
    "teacher.cache cache: it was built with a processor other than",
    "build it again",
)
def cache_of_another_processor(world: World) -> None:
    cached(world)
    path = Path("model/chat_template.jinja")
    path.write_text(path.read_text() + " ")


@case(
    "cache",
    "changed a record",
    "records.json: record 0 (id r1): its words and images are not",
    "build the cache again",
)
def cache_of_another_record(world: World) -> None:
    cached(world)
    world.records(
        record(
            conversations=[
                {"from": "human", "value": "<image>A dog?"},
                {"from": "gpt", "value": "no"},
            ]
        )
    )


@case(
    "cache",
    "used an objective that reads hidden states",
    "stage mimic: objective relation: ",
    "it needs hidden states",
    "set 'hidden: true'",
)
def cache_without_hidden_states(world: World) -> None:
    cached(world)
    world.stage(objectives=[{"kind": "relation"}])


@case(
    "cache",
    "built another cache into its folder",
    "cache: the folder holds another teacher's",
    "name a new folder",
)
def cache_into_another(world: World) -> list[str]:
    cached(world)
    world.raw["teacher"]["cache"]["k"] = 5
    return ["cache", "recipe.yaml"]


@case(
    "cache",
    "built a cache without naming its folder",
    "teacher.cache: the recipe does not say where to",
    "add 'teacher:",
)
def cache_of_no_folder(world: World) -> list[str]:
    world.teach()
    return ["cache", "recipe.yaml"]


@case(
    "cache",
    "built a cache that no objective reads",
    "stages: no stage has an objective that reads a teacher",
    "add",
)
def cache_for_nothing(world: World) -> list[str]:
    world.cache()
    world.stage(objectives=[{"kind": "ce"}])
    return ["cache", "recipe.yaml"]
