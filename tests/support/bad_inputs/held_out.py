"""Held-out records and validation."""

import json
from pathlib import Path

from tests.support.bad_inputs.table import RECORD, World, case, overridden

KIND = "held_out"


@case(
    KIND,
    "asked for the best student without held-out records",
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
    "recipe.yaml: data.validation: 'weight' is only for training",
    "leave it out",
)
overridden(
    KIND,
    "patience_without_validations",
    "stages.0.validation={interval: null, patience: 2}",
    "recipe.yaml: stages.0.validation: 'patience' needs validations",
    "set 'interval'",
)
overridden(
    KIND,
    "metric_of_nothing",
    "stages.0.validation.metric=ce",
    "recipe.yaml: stages.0.validation: 'metric' is only for 'keep: best' and 'patience'",
    "set one of them",
)


@case(
    KIND,
    "named an unknown metric for validation",
    "stage mimic: validation.metric: no metric 'anser_ce'",
    "did you mean 'answer_ce'?",
)
def unknown_metric(world: World) -> None:
    world.raw["data"]["validation"] = "records.json"
    world.stage(validation={"metric": "anser_ce", "keep": "best"})


@case(
    KIND,
    "asked to hold out a share of a stream",
    "recipe.yaml: data: a share of a stream cannot be held out",
    "give 'validation' a file",
)
def scale_to_global_mean_a_stream(world: World) -> None:
    world.raw["data"] = {"sources": [{"train": "hub:me/data", "stream": 9}], "validation": 0.1}


@case(
    KIND,
    "named a file of held-out records that is not there",
    "none.json: no such data file",
    "check data.validation",
)
def no_held_out_file(world: World) -> None:
    world.raw["data"]["validation"] = "none.json"


@case(
    KIND,
    "asked to hold out the only record",
    "records.json: its only record cannot be held out",
    "give data.validation a file",
)
def only_record_held_out(world: World) -> None:
    world.raw["data"]["validation"] = 0.5


@case(
    KIND,
    "gave a bad record among the held-out ones",
    "held.json: record 0 (id r1): no such image: none.png",
    "check data.images",
)
def bad_held_out_record(world: World) -> None:
    Path("held.json").write_text(json.dumps([{**RECORD, "image": "none.png"}]))
    world.raw["data"]["validation"] = "held.json"


@case(
    KIND,
    "asked to validate preferences with `reference_logps: once`",
    "stage mimic: validation: the reference of preferences is computed once",
    "set reference_logps to live",
)
def validation_behind_a_stored_reference(world: World) -> None:
    world.teach({"kind": "preference", "loss": "sigmoid", "reference_logps": "once"})
    world.pairs()
    world.raw["data"]["validation"] = "records.json"
